"""The Python stacks of all ranks at one moment. The ranks write them when they get SIGUSR2; of those that can't, the
kernel's state of the process is given instead.

The handler in a rank is faulthandler's (runtime/telemetry/stacks.py): it runs in C without the GIL, so it also answers
from inside a native call. A stopped process does not answer, and one that hangs in the kernel answers late or never.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime.wire.rundir import RUN_VARIABLE, STACKS_SIGNAL, rank_stacks

ANSWER_S = 3.0
"""How long to wait for a rank's stacks."""
QUIET_S = 0.15
"""The stacks are complete when the file has not grown for this long: faulthandler writes word by word."""
_POLL_S = 0.03
_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/triton/")
_COMPILED = re.compile(
    r"/torch/_dynamo/(eval_frame|external_utils|decorators)\.py|/triton/(runtime|backends)/"
    r"|/torch/_inductor/(output_code|utils|cudagraph_trees)\.py|/torch/_inductor/runtime/"
)
"""Frames of the compilers that are on the stack whenever compiled code runs, long after the compilation."""
_STATES = {
    psutil.STATUS_STOPPED: "stopped by a signal",
    psutil.STATUS_TRACING_STOP: "held by a debugger",
    psutil.STATUS_DISK_SLEEP: "in the kernel",
    psutil.STATUS_ZOMBIE: "ended, not collected by torchrun",
    psutil.STATUS_DEAD: "ended",
}
GONE = "gone"


@dataclass(frozen=True)
class ThreadStack:
    """One thread. `frames` are faulthandler's lines, innermost call first."""

    main: bool
    frames: tuple[str, ...]


@dataclass(frozen=True)
class RankStacks:
    """The stacks of one rank. `host`: the state of its process in words. `trouble`: why there are no stacks; else
    empty."""

    rank: int
    pid: int | None
    host: str
    threads: tuple[ThreadStack, ...] = ()
    trouble: str = ""

    @property
    def compiling(self) -> bool:
        """Whether the training thread is inside a compiler. Other threads don't count: inductor's workers never end."""
        frames = [frame for thread in self.threads if thread.main for frame in thread.frames]
        return any(any(name in frame for name in _COMPILERS) and not _COMPILED.search(frame) for frame in frames)


# ---- which processes -------------------------------------------------------------------------------------------------
def find_ranks(run: Path, nproc: int, hello_pids: Mapping[int, int]) -> dict[int, psutil.Process | None]:
    """The processes of ranks 0 to nproc-1 among this process's descendants; None if there is none.

    Only descendants count, so a process id that the kernel has reused names none of them; psutil compares the start
    time again when it sends a signal. `hello_pids` is rank -> process id of the ranks that have sent a hello. The
    others (a script before initialize()) are found by the environment that torchrun gave them.
    """
    below = {process.pid: process for process in psutil.Process().children(recursive=True)}
    found: dict[int, psutil.Process | None] = {rank: below.get(pid) for rank, pid in hello_pids.items()}
    missing = [rank for rank in range(nproc) if rank not in found]
    if missing:
        numbers = {pid: _rank_of(process, run) for pid, process in below.items()}
        for pid, rank in numbers.items():
            # A rank's children have its environment too.
            if rank in missing and numbers.get(_parent(below[pid])) is None:
                found.setdefault(rank, below[pid])
    return {rank: found.get(rank) for rank in range(nproc)}


def _rank_of(process: psutil.Process, run: Path) -> int | None:
    try:
        variables = process.environ()
    except (psutil.Error, OSError):
        return None
    number = variables.get("RANK", "")
    return int(number) if number.isdecimal() and variables.get(RUN_VARIABLE) == str(run) else None


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


# ---- asking ----------------------------------------------------------------------------------------------------------
def ask(
    processes: Mapping[int, psutil.Process | None],
    pids: Mapping[int, int],
    logs: Path,
    deadline_s: float = ANSWER_S,
) -> dict[int, RankStacks]:
    """Send the signal to every process and wait for the stacks, at most `deadline_s`. Blocks: call it in a thread.

    `pids` are of ranks whose process may be gone. `logs` is the attempt's folder, where the ranks write.
    """
    hosts = {rank: _host(process) for rank, process in processes.items()}
    before: dict[int, int] = {}
    troubles: dict[int, str] = {}
    for rank, process in processes.items():
        size = _size(rank_stacks(logs, rank))
        troubles[rank] = _why_not(process, hosts[rank], rank_stacks(logs, rank))
        if process is None or troubles[rank]:
            continue
        try:
            process.send_signal(STACKS_SIGNAL)
        except psutil.NoSuchProcess:
            troubles[rank] = hosts[rank] = GONE
        else:
            before[rank] = size
    _wait(before, logs, deadline_s)
    answers = {}
    for rank, process in processes.items():
        text = _new_text(rank_stacks(logs, rank), before[rank]) if rank in before else ""
        threads = parse(text)
        trouble = "" if threads else troubles[rank] or _silence(process)
        pid = process.pid if process is not None else pids.get(rank)
        answers[rank] = RankStacks(rank, pid, hosts[rank], threads, trouble)
    return answers


def _why_not(process: psutil.Process | None, host: str, answers: Path) -> str:
    """Why a process can't be asked; empty if it can. Without a handler the signal would end it."""
    if process is None or host in (GONE, _STATES[psutil.STATUS_ZOMBIE], _STATES[psutil.STATUS_DEAD]):
        return host
    if host in (_STATES[psutil.STATUS_STOPPED], _STATES[psutil.STATUS_TRACING_STOP]):
        return host  # it would answer once it is continued, when nobody waits for it
    return "" if _catches(process.pid, answers) else f"it has not installed its handler for {STACKS_SIGNAL.name} yet"


def _catches(pid: int, answers: Path) -> bool:
    """Whether the process handles the signal, as the kernel says; where it does not say (not Linux), the file that a
    rank makes first is all there is."""
    if not sys.platform.startswith("linux"):
        return answers.exists()
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (STACKS_SIGNAL - 1) & 1)


def _wait(before: Mapping[int, int], logs: Path, deadline_s: float) -> None:
    """Until every file has grown and then stopped growing."""
    deadline = time.monotonic() + deadline_s
    sizes, since = dict(before), dict.fromkeys(before, time.monotonic())
    while True:
        now = time.monotonic()
        for rank, size in sizes.items():
            fresh = _size(rank_stacks(logs, rank))
            if fresh != size:
                sizes[rank], since[rank] = fresh, now
        done = all(sizes[rank] > size and now - since[rank] >= QUIET_S for rank, size in before.items())
        if done or now >= deadline:
            return
        time.sleep(_POLL_S)


def _silence(process: psutil.Process | None) -> str:
    """Why a process that was asked did not answer: its state by now."""
    host = _host(process)
    return (
        host if host in (*_STATES.values(), GONE) or host.startswith("in the kernel") else f"does not answer ({host})"
    )


def _host(process: psutil.Process | None) -> str:
    """The state of a process in words: that of its first thread, which trains."""
    if process is None:
        return GONE
    try:
        state = process.status() if process.is_running() else psutil.STATUS_DEAD
    except psutil.ZombieProcess:
        state = psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return GONE
    words = _STATES.get(state, str(state))
    where = _wchan(process.pid) if state == psutil.STATUS_DISK_SLEEP else ""
    return f"{words}: {where}" if where else words


def _wchan(pid: int) -> str:
    """The kernel function in which the process waits; empty if the kernel does not tell."""
    try:
        name = Path(f"/proc/{pid}/wchan").read_text().strip()
    except OSError:
        return ""
    return "" if name == "0" else name


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _new_text(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def parse(text: str) -> tuple[ThreadStack, ...]:
    """The threads of one faulthandler dump, the training thread first: it is the one that got the signal."""
    threads: list[tuple[bool, list[str]]] = []
    for line in text.splitlines():
        head = _THREAD.match(line)
        if head:
            threads.append((head[1] == "Current thread", []))
        elif threads and line.strip():
            threads[-1][1].append(line)
    if threads and not any(main for main, _ in threads):
        threads[-1] = (True, threads[-1][1])  # the oldest comes last
    stacks = [ThreadStack(main, tuple(frames)) for main, frames in threads]
    return tuple(sorted(stacks, key=lambda stack: not stack.main))
