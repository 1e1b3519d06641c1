"""Finding the error in the log of a rank that has ended: its exception, the Python stack of a crash, or torchrun's
message."""

from __future__ import annotations

import re
from pathlib import Path

from runtime.telemetry.bounds import shortened
from runtime.wire.rundir import LAUNCHER_LOG
from zerotop.rundir.logs import ERROR_LINES, tail

REASON_KEPT = 500
"""Characters of an exception message that a reason repeats."""
_AGENT = re.compile(r"[IWE]\d{4} \d\d:.*torch/distributed/elastic/")
_EXCEPTION = re.compile(r"[^\W\d][\w.]*(: |$)")
"""`ValueError: text` or `pkg.Error`, at the start of a line; the frames above it are indented."""
_REASON = "error: "
"""Start of the line that sums up the error, written by the trainer for a bad config, bad data or a lack of memory."""
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
    """Whether a rank failed only because another one was gone, judged by its traceback or the end of its log."""
    return any(_COMPLAINT.search(line) for line in error.strip().splitlines()[-_COMPLAINT_LINES:])


def reason_of(error: str) -> str:
    """The error of a goodbye in one line: the trainer's summary, else the first line of the exception's message, else
    the last line."""
    last = error.strip().splitlines()[-1].strip()
    if last.startswith(_REASON):
        return shortened(last.removeprefix(_REASON), REASON_KEPT)
    return shortened(exception_line(error) or last, REASON_KEPT)


def exception_line(log: str) -> str:
    """The first line of the exception that ended a Python process, or the trainer's summary of the error; empty if the
    log has neither."""
    lines = log.splitlines()
    # The last of a chain of exceptions is the one that ended it.
    for index, line in reversed(list(enumerate(lines))):
        if line.startswith(_REASON):
            return line.removeprefix(_REASON)
        if line == "Traceback (most recent call last):":
            return next((after.strip() for after in lines[index + 1 :] if _EXCEPTION.match(after)), "")
    return ""


def abort_words(log: str) -> str:
    """The `what()` of an uncaught C++ exception; empty if there is none."""
    lines = [line.strip() for line in log.splitlines()]
    return next((line.removeprefix("what():").strip() for line in reversed(lines) if line.startswith("what():")), "")


def crash_stack(log: str) -> str:
    """The Python stack that faulthandler wrote for the crashing thread, innermost call first; empty if none."""
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
    """The end of launcher.log without its own traceback and closing table, which only repeat that a rank failed."""
    kept = []
    for line in tail(logs / LAUNCHER_LOG, lines=400).splitlines():
        if "failed (exitcode:" in line or re.match(r"={20,}$", line):
            break
        if line.strip("* ") and "OMP_NUM_THREADS" not in line and not _AGENT.match(line):
            kept.append(line)
    return "\n".join(kept[-ERROR_LINES:])
