"""Where every rank stands at one moment: the Python stacks that the ranks write themselves when SIGUSR2 asks them, and
for those that can't, what the kernel says of the process.

A rank's handler is faulthandler's (runtime/telemetry/stacks.py), in C and without the GIL: it answers from inside a
native call too. A stopped process answers nothing, and one that hangs in the kernel answers late or never.
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
"""A rank that has written nothing by then does not answer."""
QUIET_S = 0.15
"""An answer is complete when its file has not grown for so long: faulthandler writes word by word."""
_POLL_S = 0.03
_THREAD = re.compile(r"^(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$")
_COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/triton/")
_COMPILED = re.compile(
    r"/torch/_dynamo/(eval_frame|external_utils|decorators)\.py|/triton/(runtime|backends)/"
    r"|/torch/_inductor/(output_code|utils|cudagraph_trees)\.py|/torch/_inductor/runtime/"
)
"""Frames of the compilers that stand on the stack whenever compiled code runs, long after the compilation."""
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
    """frames: faulthandler's lines, the innermost first."""

    main: bool
    frames: tuple[str, ...]


@dataclass(frozen=True)
class RankStacks:
    """`host`: the process's state in words; `trouble`: why there is no answer, empty when there is one."""

    rank: int
    pid: int | None
    host: str
    threads: tuple[ThreadStack, ...] = ()
    trouble: str = ""

    @property
    def compiling(self) -> bool:
        """The training thread is inside a compiler. Other threads tell nothing: inductor's own stay for ever."""
        frames = [frame for thread in self.threads if thread.main for frame in thread.frames]
        return any(any(name in frame for name in _COMPILERS) and not _COMPILED.search(frame) for frame in frames)


# ---- which processes -------------------------------------------------------------------------------------------------
def find_ranks(run: Path, nproc: int, hello_pids: Mapping[int, int]) -> dict[int, psutil.Process | None]:
    """The processes of ranks 0 to nproc-1 among this process's descendants; None: there is none (any more).

    Only descendants count, so a number that the kernel has given away again names none of ours; psutil compares the
    start time once more when it sends a signal. `hello_pids`: rank -> pid, of the ranks that have spoken; for the
    others (a script before initialize()) the environment that torchrun gave them tells.
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
    """Ask every process for its stacks and wait for the answers, at most `deadline_s`. Blocks: call it in a thread.

    pids: of ranks whose process may be gone. logs: the attempt's folder, where the ranks write.
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
    """Why a process can't be asked; empty: it can. Without a handler the signal would end it."""
    if process is None or host in (GONE, _STATES[psutil.STATUS_ZOMBIE], _STATES[psutil.STATUS_DEAD]):
        return host
    if host in (_STATES[psutil.STATUS_STOPPED], _STATES[psutil.STATUS_TRACING_STOP]):
        return host  # it would answer when it goes on, to a question of long ago
    return "" if _catches(process.pid, answers) else f"it has no handler for {STACKS_SIGNAL.name} (yet)"


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
    """Until every file has grown and is quiet."""
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
    """Of a process that was asked and said nothing: what the kernel says by now."""
    host = _host(process)
    return (
        host if host in (*_STATES.values(), GONE) or host.startswith("in the kernel") else f"does not answer ({host})"
    )


def _host(process: psutil.Process | None) -> str:
    """A process's state in words: the kernel's, of its first thread, which trains."""
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
    """The kernel function it waits in; empty where the kernel does not tell us."""
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
    """The threads of one faulthandler dump: the main one first. That is the one that took the signal."""
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
