"""The terminal that the screen is drawn on, and the signals that end the screen."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import Any, TypeVar

from textual.app import App
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver

from runtime.process.garbage import keep_all_objects
from zerotop.output import SERVED_VARIABLE, is_served
from zerotop.tui.ascii import Plain, ascii_table, wants_ascii

__all__ = ["LEAVING_SIGNALS", "SERVED_VARIABLE", "TerminalDriver", "driver_class", "leave_on_signals", "run_app"]

LEAVING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
Result = TypeVar("Result")
LOOK_S = 1.0
"""How often the terminal is looked at."""


class TerminalDriver(LinuxDriver):
    """Draws on stdout, which is the terminal. Textual draws on stderr, so `2>log` would get the screen."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._file = _Terminal(1)


class _Terminal(TextIOWrapper):
    """A file descriptor to write to. Once the terminal has gone, writes are dropped, and nothing may hang."""

    def __init__(self, descriptor: int) -> None:
        encoding = sys.__stdout__.encoding if sys.__stdout__ else "utf-8"
        super().__init__(os.fdopen(descriptor, "wb", closefd=False), encoding=encoding, errors="replace")
        self._plain = Plain(ascii_table()) if wants_ascii() else None

    def write(self, text: str) -> int:
        shown = text if self._plain is None else text.translate(self._plain)
        with suppress(OSError):
            super().write(shown)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def driver_class() -> type[Driver]:
    """What the screen is drawn with: the page of a browser if `zerotop web` has started this process, else the
    terminal."""
    if is_served():
        from textual.drivers.web_driver import WebDriver

        return WebDriver
    return TerminalDriver


def run_app(app: App[Result]) -> Result | None:
    """Run the application until the user leaves it, in a process that draws nothing else; returns its result."""
    keep_all_objects()  # what has been imported for it
    return app.run()


def leave_on_signals(leave: Callable[[int], None]) -> None:
    """Call `leave` with the first SIGTERM or SIGHUP, in the running event loop; a second one ends the process. A
    terminal that has gone without a signal (nohup, a session of its own) counts as SIGHUP: Textual would read its end
    over and over."""
    loop = asyncio.get_running_loop()
    left = False

    def received(number: int) -> None:
        nonlocal left
        left = True
        for one in LEAVING_SIGNALS:
            loop.remove_signal_handler(one)
        leave(number)

    def look() -> None:
        if left:
            return
        if has_hung_up(0):
            received(signal.SIGHUP)
        else:
            loop.call_later(LOOK_S, look)

    for number in LEAVING_SIGNALS:
        loop.add_signal_handler(number, received, number)
    loop.call_later(LOOK_S, look)


def has_hung_up(descriptor: int) -> bool:
    """Whether the other end of the terminal or pipe `descriptor` is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
