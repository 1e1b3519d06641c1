"""How a run ended, from what is known when its processes are gone: goodbyes, exit codes, and the tails of the logs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.wire.messages import Goodbye, RunStateName
from zerotop.runs.processes import signal_name

ERROR_LINES = 30
_TAIL_BYTES = 64 * 1024
# torchrun's own words on its children. Its monitor logs the first line; its closing table holds one block per failed
# rank.
_FIRST = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+) ")
_BLOCK = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) ")
_AGENT = re.compile(r"[IWE]\d{4} \d\d:.*torch/distributed/elastic/")
_EXCEPTION = re.compile(r"[^\W\d][\w.]*(: |$)")
"""`ValueError: text` or `pkg.Error`, at the start of a line; the frames above it are indented."""
_REFUSED = "error: "
"""How runtime/__main__.py begins its message about a config or data that it can't use."""
_PYTHONS_EXITS = (1, 2, None)
"""Of an uncaught exception and of a refused config; None: not known. Any other says that the program chose it."""
_SIGTERM_EXIT = -15
_NOT_INITIALIZED = "the script never called runtime.initialize(): nothing was trained or watched"


@dataclass(frozen=True)
class Evidence:
    """What the supervisor saw. `exit_codes` are of ranks whose code is known at first hand (adopted children);
    torchrun's log has the rest."""

    nproc: int
    launcher_exit: int | None
    logs: Path
    goodbyes: Mapping[int, Goodbye] = field(default_factory=dict)
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    stopping: bool = False
    abort_reason: str | None = None
    failure: str | None = None
    """Why the supervisor ended the ranks as failed (they hang); what they said or how they ended counts no more."""
    steps: Mapping[int, int] = field(default_factory=dict)
    """The last finished optimizer step of each rank that finished one."""
    silent_script: bool = False
    """A script was run and no rank ever said hello."""
    spoke: bool = False
    """Some rank said hello."""
    start_step: int = 0
    """The step that this attempt went on from."""


@dataclass(frozen=True)
class Outcome:
    state: RunStateName
    reason: str
    exit_code: int | None = None
    failed_rank: int | None = None
    error: str = ""


def decide(seen: Evidence) -> Outcome:
    """The final state; pure but for reading the logs."""
    if seen.abort_reason is not None:
        return Outcome("aborted", seen.abort_reason, seen.launcher_exit)
    if seen.failure is not None:
        return Outcome("failed", seen.failure)
    words = {goodbye.outcome for goodbye in seen.goodbyes.values()}
    if seen.launcher_exit == 0 and not words & {"failed", "aborted"}:
        if "stopped" in words or (seen.stopping and not words):
            return Outcome("stopped", _goodbye_reason(seen) or "stopped on request", 0)
        return Outcome("finished", _NOT_INITIALIZED if seen.silent_script else "all ranks finished", 0)
    codes = _exit_codes(seen)
    rank = _first_to_fail(seen, codes)
    if rank is None:
        return _launcher_failed(seen)
    code = codes.get(rank)
    return Outcome("failed", _rank_reason(seen, rank, code), code, rank, _rank_error(seen, rank))


def _goodbye_reason(seen: Evidence) -> str:
    reasons = [
        goodbye.error for _, goodbye in sorted(seen.goodbyes.items()) if goodbye.outcome == "stopped" and goodbye.error
    ]
    return reasons[0].splitlines()[-1] if reasons else ""


def _exit_codes(seen: Evidence) -> dict[int, int]:
    """rank -> exit code for ranks that failed. On one node the local rank is the rank."""
    codes = {rank: code for rank, code in seen.exit_codes.items() if code != 0}
    text = tail(seen.logs / "torchrun.log", lines=400)
    for code, rank in _FIRST.findall(text):
        codes.setdefault(int(rank), int(code))
    for rank, code in _BLOCK.findall(text):
        codes.setdefault(int(rank), int(code))
    return codes


def _first_to_fail(seen: Evidence, codes: Mapping[int, int]) -> int | None:
    """A rank's death makes its peers fail too (lost connections, torchrun's TERM); the cause must not hide behind them.

    A rank that was killed said nothing, and its peers' complaints follow from that; among ranks that raised, the first
    one did it.
    """
    killed = [rank for rank, code in codes.items() if code < 0 and code != _SIGTERM_EXIT and rank not in seen.goodbyes]
    if killed:
        return killed[0]
    failed = sorted((goodbye.wall_s, rank) for rank, goodbye in seen.goodbyes.items() if goodbye.outcome == "failed")
    if failed:
        return failed[0][1]
    return next((rank for rank, code in codes.items() if code != _SIGTERM_EXIT), next(iter(codes), None))


def _rank_reason(seen: Evidence, rank: int, code: int | None) -> str:
    goodbye = seen.goodbyes.get(rank)
    if code is not None and code < 0 and goodbye is None:
        name = signal_name(-code)
        hint = {
            "SIGKILL": " (out of memory?)",
            "SIGSEGV": " (a crash in native code)",
            "SIGBUS": " (out of shared memory?)",
        }.get(name, "")
        return f"rank {rank} was killed by {name}{hint}"
    if goodbye is not None and goodbye.error:
        last = goodbye.error.strip().splitlines()[-1].strip()
        return f"rank {rank} failed after step {goodbye.step}: {last}"
    raised = _exception_line(tail(seen.logs / f"rank-{rank}.log", lines=400)) if code in _PYTHONS_EXITS else ""
    if raised and goodbye is None:
        step = seen.steps.get(rank)
        when = "before its first step" if step is None else f"after step {step}"
        return f"rank {rank} failed {when}: {raised}"
    return f"rank {rank} failed" if code is None else f"rank {rank} exited with code {code}"


def _exception_line(log: str) -> str:
    """What a Python that dies of an exception writes under its traceback, or our own word on a refused config; empty
    when the log has neither. A message may have more lines; the first one names it."""
    lines = log.splitlines()
    # The last of a chain of exceptions is the one that ended it.
    for index, line in reversed(list(enumerate(lines))):
        if line.startswith(_REFUSED):
            return line.removeprefix(_REFUSED)
        if line == "Traceback (most recent call last):":
            return next((after.strip() for after in lines[index + 1 :] if _EXCEPTION.match(after)), "")
    return ""


def _rank_error(seen: Evidence, rank: int) -> str:
    goodbye = seen.goodbyes.get(rank)
    if goodbye is not None and goodbye.error:
        return "\n".join(goodbye.error.strip().splitlines()[-ERROR_LINES:])
    return tail(seen.logs / f"rank-{rank}.log") or _launcher_tail(seen)


def _launcher_failed(seen: Evidence) -> Outcome:
    code = seen.launcher_exit
    if code is None:
        reason = "the supervisor ended before the ranks did"
    elif code < 0:
        reason = f"torchrun was killed by {signal_name(-code)}"
    else:
        reason = f"torchrun exited with code {code} before any rank failed"
    return Outcome("failed", reason, code, None, _launcher_tail(seen))


def _launcher_tail(seen: Evidence) -> str:
    """torchrun.log without its own traceback and closing table, which repeat in thirty lines that a rank failed."""
    kept = []
    for line in tail(seen.logs / "torchrun.log", lines=400).splitlines():
        if "failed (exitcode:" in line or re.match(r"={20,}$", line):
            break
        if line.strip("* ") and "OMP_NUM_THREADS" not in line and not _AGENT.match(line):
            kept.append(line)
    return "\n".join(kept[-ERROR_LINES:])


def tail(path: Path, lines: int = ERROR_LINES) -> str:
    """The last lines of a text file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
