"""How an attempt ended and why, decided from what is known once its processes are gone."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.telemetry.bounds import shortened, shortened_error
from runtime.wire.messages import Goodbye, RunStateName
from runtime.wire.rundir import LAUNCHER_LOG
from zerotop.diagnose.evidence import FailureEvidence
from zerotop.diagnose.rank_errors import (
    REASON_KEPT,
    abort_words,
    crash_stack,
    exception_line,
    is_complaint,
    launcher_tail,
    reason_of,
)
from zerotop.rundir.logs import ERROR_LINES, tail
from zerotop.state.stall import ranks_text

# What torchrun logs about its children: a line for the first failure, and a closing table with a block per failed rank.
_FIRST = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) ")
_BLOCK = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) ")
_PYTHONS_EXITS = (1, 2, None)
"""Exit codes of an uncaught exception and of a rejected config; None: not known. The program chose any other itself."""
_SIGTERM_EXIT = -15
_CHILD_KILLED = "is killed by signal: Killed"
"""What torch says about a killed DataLoader worker."""
_LOG_LINES = 400
_SIGNALS = {
    "SIGSEGV": "segmentation fault in native code",
    "SIGBUS": "bus error: memory-mapped data is missing, or /dev/shm is full",
    "SIGABRT": "native code aborted",
    "SIGILL": "illegal instruction: native code built for another CPU",
    "SIGFPE": "integer division by zero in native code",
    "SIGTERM": "from a batch system or kill",
    "SIGINT": "interrupted",
    "SIGHUP": "its terminal was closed",
    "SIGXCPU": "CPU time limit reached, ulimit -t",
    "SIGXFSZ": "file size limit reached, ulimit -f",
}
_SAME_NUMBER_OF_STEPS = """\
What to change: all ranks must take the same number of steps, because every step has collectives of all ranks.
  - initialize(training_data=...) gives every rank as many batches
  - a DataLoader of your own: DistributedSampler pads or drops samples until the ranks have equally many; drop_last=True
  - other data: before the loop, all-reduce the minimum number of batches and stop after that many
docs/faults.md, "Ranks with different amounts of data", has the code."""
_TERM_EXITS = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a command that a SIGTERM has ended, of its own or of a shell around it."""
_TORCHRUN_SIGTERM = "got signal: 15"
"""In what torchrun raises when it gets a SIGTERM, with exit code 1."""
_NOT_INITIALIZED = "the script never called runtime.initialize(): nothing was trained or watched"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `error` holds the last lines of the rank that failed."""

    state: RunStateName
    reason: str
    exit_code: int | None = None
    failed_rank: int | None = None
    error: str = ""
    cause: str = ""
    """The reason without figures that differ each time, so that equal failures compare equal; empty: the reason."""
    repeats: bool = False
    """Another attempt would end the same way: the cause is the script or its data."""


def decide(seen: FailureEvidence) -> Outcome:
    """The outcome; pure except that it reads the logs."""
    if seen.abort_reason is not None:
        return Outcome("aborted", seen.abort_reason, seen.launcher_exit)
    if seen.failure is not None:
        return Outcome("failed", seen.failure, repeats=bool(_ended_early(seen)))
    words = {goodbye.outcome for goodbye in seen.goodbyes.values()}
    if seen.launcher_exit == 0 and not words & {"failed", "aborted"}:
        if "stopped" in words or (seen.stopping and not words):
            return Outcome("stopped", _goodbye_reason(seen) or "stopped on request", 0)
        return Outcome("finished", _finish_reason(seen), 0)
    if seen.wrapped and seen.stopping and "failed" not in words and _ended_by_sigterm(seen):
        return Outcome("stopped", "the command was sent SIGTERM and has ended", seen.launcher_exit)
    if seen.launcher_killed:
        return _launcher_failed(seen)
    codes = _exit_codes(seen)
    rank = _first_to_fail(seen, codes)
    if rank is None:
        return _launcher_failed(seen)
    if _complains(seen, rank) and (early := _ended_early(seen)):
        return _early_end(seen, early)
    goodbye = seen.goodbyes.get(rank)
    if goodbye is not None and goodbye.culprit is not None and goodbye.culprit in seen.goodbyes:
        rank = goodbye.culprit
    code = codes.get(rank)
    base = _rank_reason(seen, rank, code)
    more = "".join(words(seen, rank, code) for words in (_memory_words, _shared_words, _xid_words))
    return Outcome("failed", base + more, code, rank, _rank_error(seen, rank, code), cause=base if more else "")


def _ended_by_sigterm(seen: FailureEvidence) -> bool:
    """Whether the command or, as a launcher reports it, every rank that failed was ended by SIGTERM."""
    codes = _exit_codes(seen)
    if seen.launcher_exit in _TERM_EXITS or (codes and all(code in _TERM_EXITS for code in codes.values())):
        return True
    return _TORCHRUN_SIGTERM in tail(seen.logs / LAUNCHER_LOG, _LOG_LINES)


def _finish_reason(seen: FailureEvidence) -> str:
    if seen.wrapped and not seen.goodbyes:
        return "the command ended with exit code 0"
    return _NOT_INITIALIZED if seen.silent_script else "all ranks finished"


def _goodbye_reason(seen: FailureEvidence) -> str:
    reasons = [
        goodbye.error for _, goodbye in sorted(seen.goodbyes.items()) if goodbye.outcome == "stopped" and goodbye.error
    ]
    return reasons[0].splitlines()[-1] if reasons else ""


def _exit_codes(seen: FailureEvidence) -> dict[int, int]:
    """Rank -> exit code of the ranks that failed, those that we read ourselves first."""
    codes = {rank: code for rank, code in seen.exit_codes.items() if code != 0}
    for rank, code in reported_exit_codes(seen.logs).items():
        codes.setdefault(rank, code)
    return {rank: code for rank, code in codes.items() if code > 0 or rank not in seen.ended_by_us}


def reported_exit_codes(logs: Path) -> dict[int, int]:
    """Rank -> exit code of the failed ranks that torchrun has named in its log so far, in the order it named them.

    It names the first one as soon as it has noticed, and the others once all have ended. On one node the local rank
    is the rank.
    """
    text = tail(logs / LAUNCHER_LOG, _LOG_LINES)
    codes: dict[int, int] = {}
    for code, rank in _FIRST.findall(text):
        codes.setdefault(int(rank), int(code))
    for rank, code in _BLOCK.findall(text):
        codes.setdefault(int(rank), int(code))
    return codes


def _first_to_fail(seen: FailureEvidence, codes: Mapping[int, int]) -> int | None:
    """The rank that failed first. A rank's death makes the others fail too (lost connections, torchrun's SIGTERM), and
    must not hide behind them.

    A rank that was killed sent no goodbye; among ranks that raised, the first one is the cause. A rank that complains
    of another one comes last: it is the cause only if there is no other.
    """
    killed = [rank for rank, code in codes.items() if code < 0 and code != _SIGTERM_EXIT and rank not in seen.goodbyes]
    failed = [
        rank
        for _, rank in sorted((word.wall_s, rank) for rank, word in seen.goodbyes.items() if word.outcome == "failed")
    ]
    left = [rank for rank, code in codes.items() if code != _SIGTERM_EXIT and rank not in (*killed, *failed)]
    suspects = [*killed, *failed, *left]
    return next((rank for rank in suspects if not _complains(seen, rank)), next(iter([*suspects, *codes]), None))


def _ended_early(seen: FailureEvidence) -> tuple[int, ...]:
    """Ranks that finished, by their goodbye or, without one, by their exit code."""
    finished = {rank for rank, word in seen.goodbyes.items() if word.outcome == "finished"}
    silent = {rank for rank, code in seen.exit_codes.items() if code == 0 and rank not in seen.goodbyes}
    return tuple(sorted(finished | silent))


def _early_end(seen: FailureEvidence, ranks: tuple[int, ...]) -> Outcome:
    """The outcome when the others could not continue without these ranks; the others' errors follow from that."""
    first = ranks[0]
    goodbye = seen.goodbyes.get(first)
    step = goodbye.step if goodbye is not None else seen.steps.get(first, seen.start_step)
    changes = _SAME_NUMBER_OF_STEPS.splitlines()
    log = tail(seen.logs / f"rank-{first}.log", ERROR_LINES - len(changes) - 1).splitlines()
    error = "\n".join([*log, *([""] if log else []), *changes])
    return Outcome("failed", early_end_reason(ranks, step, goodbye), 0, first, error, repeats=True)


def early_end_reason(ranks: tuple[int, ...], step: int, goodbye: Goodbye | None) -> str:
    """`step` and `goodbye` are those of the first of these ranks; None: its process sent no goodbye."""
    its = "its" if len(ranks) == 1 else "their"
    if goodbye is None:
        why = f"{its} process{'' if len(ranks) == 1 else 'es'} exited with code 0"
    elif goodbye.error.startswith("SystemExit"):
        why = f"{its} script called sys.exit()"
    else:
        why = f"{its} data is shorter, or {its} loop takes fewer steps"
    return f"{ranks_text(ranks)} ended after step {step} while the others went on: {why}"


def _complains(seen: FailureEvidence, rank: int) -> bool:
    goodbye = seen.goodbyes.get(rank)
    return is_complaint(goodbye.error if goodbye is not None else tail(seen.logs / f"rank-{rank}.log"))


def _rank_reason(seen: FailureEvidence, rank: int, code: int | None) -> str:
    goodbye = seen.goodbyes.get(rank)
    if code is not None and code < 0 and goodbye is None:
        return f"rank {rank} was killed by {_signal_words(seen, rank, code)}"
    if goodbye is not None and goodbye.error:
        who = "all ranks" if _fail_alike(seen) else f"rank {rank}"
        return f"{who} failed after step {goodbye.step}: {reason_of(goodbye.error)}"
    log = tail(seen.logs / f"rank-{rank}.log", _LOG_LINES)
    raised = exception_line(log) if code in _PYTHONS_EXITS else ""
    if raised and goodbye is None:
        raised = shortened(raised, REASON_KEPT)
        step = seen.steps.get(rank)
        when = "before its first step" if step is None else f"after step {step}"
        return f"rank {rank} failed {when}: {raised}"
    return f"rank {rank} failed" if code is None else f"rank {rank} exited with code {code}"


def _fail_alike(seen: FailureEvidence) -> bool:
    """Whether all ranks left at one step with the same error, so that no single one is the cause."""
    words = {(word.outcome, word.step, reason_of(word.error) if word.error else "") for word in seen.goodbyes.values()}
    blamed = any(word.culprit is not None for word in seen.goodbyes.values())
    return 1 < seen.nproc == len(seen.goodbyes) and len(words) == 1 and not blamed


def _signal_words(seen: FailureEvidence, rank: int, code: int) -> str:
    """The signal with its meaning, such as "SIGSEGV (segmentation fault in native code)"."""
    name = _signal_name(-code)
    words = _SIGNALS.get(name, "")
    if name == "SIGABRT":
        words = abort_words(tail(seen.logs / f"rank-{rank}.log", _LOG_LINES)) or words
    return f"{name} ({words})" if words else name


def _memory_words(seen: FailureEvidence, rank: int, code: int | None) -> str:
    """Of a SIGKILL, of the rank or of a worker that it needed: whether the OOM killer sent it."""
    goodbye, system = seen.goodbyes.get(rank), seen.system
    of_child = goodbye is not None and _CHILD_KILLED in goodbye.error
    if not of_child and (code != -signal.SIGKILL or goodbye is not None):
        return ""
    evidence = system.memory.killed(rank) if system is not None else ""
    if system is not None and evidence:
        first = f"try {system.remedies.first}" if system.remedies.first else ""
        return ": " + "; ".join(part for part in (evidence, system.memory.held, first) if part)
    if of_child:
        return ""
    if system is not None and system.memory.told:
        return " (not by the kernel's OOM killer)"
    return " (perhaps by the kernel's OOM killer: its records can't be read here)"


def _shared_words(seen: FailureEvidence, rank: int, code: int | None) -> str:
    """Of a SIGBUS: the state of /dev/shm, which may be the cause."""
    if code != -signal.SIGBUS or rank in seen.goodbyes or seen.system is None:
        return ""
    return f"; {seen.system.memory.shared}"


def _xid_words(seen: FailureEvidence, rank: int, code: int | None) -> str:
    xid = seen.system.xids.get(rank) if seen.system is not None else None
    return f"; {xid}" if xid else ""


def _rank_error(seen: FailureEvidence, rank: int, code: int | None) -> str:
    """At most ERROR_LINES lines of the rank's error, and what to change if it was killed for its memory."""
    goodbye, system = seen.goodbyes.get(rank), seen.system
    changes: list[str] = []
    if system is not None and system.memory.killed(rank) and _memory_words(seen, rank, code) and system.remedies.lines:
        changes = ["", "What to change to take less host memory:", *(f"  {line}" for line in system.remedies.lines)]
    room = ERROR_LINES - len(changes)
    log = seen.logs / f"rank-{rank}.log"
    if goodbye is not None and goodbye.error:
        left = goodbye.error.strip().splitlines()[-room:]
    elif code is not None and code < 0 and (stack := crash_stack(tail(log, _LOG_LINES))):
        left = stack.splitlines()[:room]
    else:
        left = (tail(log) or launcher_tail(seen.logs)).splitlines()[-room:]
    return shortened_error("\n".join([*left, *changes]))


def _launcher_failed(seen: FailureEvidence) -> Outcome:
    code, who = seen.launcher_exit, "the command" if seen.wrapped else "torchrun"
    if code is None:
        reason = "the supervisor ended before the ranks did"
    elif code < 0:
        reason = f"{who} was killed by {_signal_name(-code)}"
        evidence = seen.system.memory.evidence if seen.system is not None else ""
        if evidence and code == -signal.SIGKILL:
            reason += f"; {evidence}"
    elif seen.wrapped:
        raised = exception_line(tail(seen.logs / LAUNCHER_LOG, _LOG_LINES)) if code in _PYTHONS_EXITS else ""
        reason = f"the command failed: {shortened(raised, REASON_KEPT)}" if raised else f"it exited with code {code}"
    else:
        reason = f"torchrun exited with code {code} before any rank failed"
    return Outcome("failed", reason, code, None, launcher_tail(seen.logs))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
