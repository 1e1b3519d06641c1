"""The first frame: what the run directory says of a run, on the terminal's alternate screen, while the screen itself is
still being imported. That takes longer than all before it, and nobody should look at an empty terminal meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.wire.messages import RunStatus
from zerotop.clean import clean_line
from zerotop.output import is_served
from zerotop.tui.ascii import wants_ascii

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J\x1b[H", "\x1b[?25h\x1b[?1049l"
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def first_frame(status: RunStatus | None) -> Iterator[None]:
    """Show the frame and prepare the screen inside, whose application takes the terminal over. If that fails, or a
    signal ends it, the terminal is as it was before. Without a status, or a terminal, nothing is shown."""
    if status is None or is_served() or not sys.stdout.isatty():
        yield
        return
    before = [signal.signal(number, _end) for number in _SIGNALS] if _in_main_thread() else []
    _write(_ENTER + frame_text(status, os.get_terminal_size(sys.stdout.fileno()).columns))
    try:
        yield
    except BaseException:
        _write(_LEAVE)
        raise
    finally:
        for number, handler in zip(_SIGNALS, before, strict=False):
            signal.signal(number, handler)


def frame_text(status: RunStatus, width: int) -> str:
    """The frame's lines, with the name and the state where the header will have them."""
    name, state, most = clean_line(status.name), status.state, max(8, width // 8)
    if len(name) > most:
        name = name[: most - 1] + ("~" if wants_ascii() else "…")
    step = f"  step {status.step}" if status.step else ""
    room = max(0, width - len(name) - 3)
    return f" {_BOLD}{name}{_PLAIN}  {f'  {state}{step}'[:room]}\r\n {_DIM}{'opening the screen'[: width - 1]}{_PLAIN}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
