"""The Python stacks of all ranks at one moment. The ranks write them when they get SIGUSR2; of those that can't, py-spy
reads them where it is installed, and the kernel tells the state of the process.

The handler in a rank is faulthandler's (runtime/telemetry/stacks.py): it runs in C without the GIL, so it also answers
from inside a native call. A stopped process does not answer, and one that hangs in the kernel answers late or never.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from runtime.wire.rundir import RUN_VARIABLE, STACKS_SIGNAL, rank_stacks
from zerotop.diagnose import pyspy
from zerotop.diagnose.frames import ThreadStack, parse, place
from zerotop.diagnose.process_state import (
    ENDED,
    GONE,
    IN_KERNEL,
    STATES,
    STOPPED,
    TRACED,
    catches,
    is_frozen,
    kernel_view,
    process_state,
)

ANSWER_S = 3.0
"""How long to wait for a rank's stacks."""
QUIET_S = 0.15
"""The stacks are complete when the file has not grown for this long: faulthandler writes word by word."""
_POLL_S = 0.03
_READERS = 2
"""Calls of py-spy at one time: each takes 300 MiB with torch's symbols."""
_COMPILERS = ("/torch/_dynamo/", "/torch/_inductor/", "/triton/")
_COMPILED = re.compile(
    r"/torch/_dynamo/(eval_frame|external_utils|decorators)\.py|/triton/(runtime|backends)/"
    r"|/torch/_inductor/(output_code|utils|cudagraph_trees)\.py|/torch/_inductor/runtime/"
)
"""Frames of the compilers that are on the stack whenever compiled code runs, long after the compilation."""


@dataclass(frozen=True)
class RankStacks:
    """The stacks of one rank. `host`: the state of its process in words. `trouble`: why it did not answer; else
    empty."""

    rank: int
    pid: int | None
    host: str
    threads: tuple[ThreadStack, ...] = ()
    trouble: str = ""
    by_pyspy: bool = False
    """Whether py-spy read `threads`, because the rank did not answer."""
    native: tuple[str, ...] = ()
    """Frames of the training thread with C frames, innermost first; empty unless py-spy was asked for them."""
    native_trouble: str = ""
    """Why py-spy gave none."""
    holds_gil: bool = False
    """Whether py-spy saw the training thread hold the global interpreter lock."""
    kernel: tuple[str, ...] = ()
    """What the kernel says of a process that did not answer."""

    @property
    def place(self) -> str:
        """Where the training thread is, in a few words; the state of the process if there are no stacks."""
        python = next((thread.frames for thread in self.threads if thread.main), ())
        where = place(self.native or python)
        return f"{self.trouble}: {where}" if self.trouble and where else where or self.trouble or self.host

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
    reader: str | None = None,
) -> dict[int, RankStacks]:
    """Send the signal to every process and wait for the stacks, at most `deadline_s`. Blocks: call it in a thread.

    `pids` are of ranks whose process may be gone. `logs` is the attempt's folder, where the ranks write. `reader` is
    the path of py-spy, for those that do not answer.
    """
    hosts = {rank: process_state(process) for rank, process in processes.items()}
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
    _wait(before, processes, logs, deadline_s)
    answers = {}
    for rank, process in processes.items():
        text = _new_text(rank_stacks(logs, rank), before[rank]) if rank in before else ""
        threads = parse(text)
        trouble = "" if threads else troubles[rank] or _silence(process)
        pid = process.pid if process is not None else pids.get(rank)
        kernel = kernel_view(process.pid) if trouble and process is not None else ()
        answers[rank] = RankStacks(rank, pid, hosts[rank], threads, trouble, kernel=kernel)
    return _read_silent(answers, reader) if reader is not None else answers


def _read_silent(answers: dict[int, RankStacks], reader: str) -> dict[int, RankStacks]:
    """Add the stacks of living ranks that did not answer, without stopping them."""
    silent = [
        found for found in answers.values() if found.trouble and found.pid and found.trouble not in (*ENDED, GONE)
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        dumps = pool.map(lambda found: pyspy.dump(reader, found.pid or 0, native=False), silent)
        read = {
            found.rank: replace(
                found,
                threads=seen.threads,
                by_pyspy=bool(seen.threads),
                native_trouble=seen.trouble,
                holds_gil=seen.holds_gil,
            )
            for found, seen in zip(silent, dumps, strict=True)
        }
    return answers | read


def with_native_frames(answers: Mapping[int, RankStacks], ranks: Collection[int], reader: str) -> dict[int, RankStacks]:
    """`answers` with the C frames of `ranks`. Blocks, for at most `pyspy.NATIVE_S`. A process is stopped while it is
    read; one that can't run is left alone."""
    wanted = [answers[rank] for rank in ranks if answers[rank].pid and answers[rank].trouble not in (*ENDED, GONE)]
    wanted = [found for found in wanted if not is_frozen(found.host)]
    deadline = time.monotonic() + pyspy.NATIVE_S

    def read_one(found: RankStacks) -> pyspy.Dump:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return pyspy.Dump(trouble="no time was left for its C frames")
        return pyspy.dump(reader, found.pid or 0, native=True, timeout_s=left_s)

    with ThreadPoolExecutor(_READERS) as pool:
        dumps = list(pool.map(read_one, wanted))
    read = dict(answers)
    for found, seen in zip(wanted, dumps, strict=True):
        frames = next((thread.frames for thread in seen.threads if thread.main), ())
        read[found.rank] = replace(found, native=frames, native_trouble=seen.trouble, holds_gil=seen.holds_gil)
    return read


def _why_not(process: psutil.Process | None, host: str, answers: Path) -> str:
    """Why a process can't be asked; empty if it can. Without a handler the signal would end it."""
    if process is None or host in (GONE, *ENDED):
        return host
    if host in (STOPPED, TRACED):
        return host  # it would answer once it is continued, when nobody waits for it
    handled = catches(process.pid)
    if handled is None:  # the file that a rank makes first is all there is
        handled = answers.exists()
    return "" if handled else f"it has not installed its handler for {STACKS_SIGNAL.name} yet"


def _wait(
    before: Mapping[int, int], processes: Mapping[int, psutil.Process | None], logs: Path, deadline_s: float
) -> None:
    """Until every file has grown and then stopped growing, or its process has ended."""
    deadline = time.monotonic() + deadline_s
    sizes, since = dict(before), dict.fromkeys(before, time.monotonic())
    while True:
        now = time.monotonic()
        for rank, size in sizes.items():
            fresh = _size(rank_stacks(logs, rank))
            if fresh != size:
                sizes[rank], since[rank] = fresh, now
        waiting = [rank for rank, size in before.items() if sizes[rank] <= size or now - since[rank] < QUIET_S]
        if now >= deadline or all(process_state(processes[rank]) in (*ENDED, GONE) for rank in waiting):
            return
        time.sleep(_POLL_S)


def _silence(process: psutil.Process | None) -> str:
    """Why a process that was asked did not answer: its state by now."""
    host = process_state(process)
    return host if host in (*STATES.values(), GONE) or host.startswith(IN_KERNEL) else f"does not answer ({host})"


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
