"""What a rank is doing before it has introduced itself to the run: one line in a file, which the supervisor reads.

Telemetry begins when the engine is complete, and a large model is loaded for minutes before that.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MOST_CHARACTERS = 120
_file: Path | None = None
"""Where this process writes; None before `begin_start` and after `end_start`."""


def start_file(sockets: Path) -> Path:
    """The file in a run's sockets folder."""
    return sockets / "starting"


def begin_start(sockets: Path) -> None:
    """Let this process tell what it is doing: rank 0's, before anything that takes long."""
    global _file
    _file = start_file(sockets)


def end_start() -> None:
    """The rank introduces itself: from now on `tell_start` does nothing."""
    global _file
    _file = None


def tell_start(text: str) -> None:
    """Say what is being done, as "building the engine". Does nothing on other ranks, and outside a run."""
    if _file is None:
        return
    line = " ".join(text.split())[:MOST_CHARACTERS]
    temporary = _file.with_name(f".starting-{os.getpid()}")
    with suppress(OSError):  # the folder of a run that has ended; nothing depends on the line
        temporary.write_text(line, encoding="utf-8")
        temporary.replace(_file)


def read_start(sockets: Path) -> str:
    """What was told last; "" if nothing was."""
    try:
        return start_file(sockets).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
