"""What is left in the logs of a rank that is gone: its exception, the Python stack of a crash, torchrun's own words."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.telemetry.bounds import shortened

ERROR_LINES = 30
REASON_KEPT = 500
"""Characters of an exception's line that a reason repeats."""
_TAIL_BYTES = 64 * 1024
_AGENT = re.compile(r"[IWE]\d{4} \d\d:.*torch/distributed/elastic/")
_EXCEPTION = re.compile(r"[^\W\d][\w.]*(: |$)")
"""`ValueError: text` or `pkg.Error`, at the start of a line; the frames above it are indented."""
_REASON = "error: "
"""How runtime/__main__.py begins the line in which it says it all: on a config or data that it can't use, and when
memory ran out."""
_CRASH = "Fatal Python error: "
"""faulthandler's first line."""
_COMPLAINT_LINES = 12
_COMPLAINT = re.compile(
    # Gloo and the TCP store
    r"[Cc]onnection (was likely )?(closed|reset) by (remote )?peer|Connection was likely closed|Broken pipe"
    r"|Application timeout caused pair closure|failed to recv, got 0 bytes"
    # NCCL
    r"|nccl(Remote|System)Error|unhandled system error|NCCL communicator was aborted"
    r"|Watchdog caught collective operation|remote process exited or there was a network error"
    # ours: runtime/comm/shared_memory.py, runtime/comm/pending.py
    r"|rank \d+ \(pid \d+\) is gone|another rank is gone"
)


def is_complaint(error: str) -> bool:
    """Whether a rank failed because another one was gone, by its traceback or the end of its log."""
    return any(_COMPLAINT.search(line) for line in error.strip().splitlines()[-_COMPLAINT_LINES:])


def reason_of(error: str) -> str:
    """A goodbye's error in one line: our own word on it, the first line of an exception's message, or the last line."""
    last = error.strip().splitlines()[-1].strip()
    if last.startswith(_REASON):
        return shortened(last.removeprefix(_REASON), REASON_KEPT)
    return shortened(exception_line(error) or last, REASON_KEPT)


def exception_line(log: str) -> str:
    """What a Python that dies of an exception writes under its traceback, or our own word on what we can't go on with;
    empty when the log has neither. A message may have more lines; the first one names it."""
    lines = log.splitlines()
    # The last of a chain of exceptions is the one that ended it.
    for index, line in reversed(list(enumerate(lines))):
        if line.startswith(_REASON):
            return line.removeprefix(_REASON)
        if line == "Traceback (most recent call last):":
            return next((after.strip() for after in lines[index + 1 :] if _EXCEPTION.match(after)), "")
    return ""


def abort_words(log: str) -> str:
    """What C++ said before it gave up: `what()` of the exception that nobody caught; empty when it said nothing."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line.removeprefix("what():").strip() for line in reversed(lines) if line.startswith("what():")), "")


def crash_stack(log: str) -> str:
    """Where a crash in native code left the Python code of its thread: the innermost call first; empty without one."""
    lines = log.splitlines()
    begin = next((n for n, line in reversed(list(enumerate(lines))) if line.startswith(_CRASH)), None)
    if begin is None:
        return ""
    thread = next((n for n in range(begin, len(lines)) if lines[n].startswith("Current thread ")), None)
    if thread is None:
        return "\n".join(lines[begin : begin + ERROR_LINES])
    end = next((n for n in range(thread + 1, len(lines)) if not lines[n].startswith("  ")), len(lines))
    return "\n".join([lines[begin], *lines[thread:end]][:ERROR_LINES])


def launcher_tail(logs: Path) -> str:
    """torchrun.log without its own traceback and closing table, which repeat in thirty lines that a rank failed."""
    kept = []
    for line in tail(logs / "torchrun.log", lines=400).splitlines():
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
