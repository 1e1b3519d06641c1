"""The terminal that the screen is drawn on, and the signals that end the screen."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver

from zerotop.output import SERVED_VARIABLE, is_served
from zerotop.tui.ascii import Plain, ascii_table, wants_ascii

__all__ = ["LEAVING_SIGNALS", "SERVED_VARIABLE", "TerminalDriver", "driver_class", "leave_on_signals"]

LEAVING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


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


def leave_on_signals(leave: Callable[[int], None]) -> None:
    """Call `leave` with the first SIGTERM or SIGHUP, in the running event loop; a second one ends the process."""
    loop = asyncio.get_running_loop()

    def received(number: int) -> None:
        for one in LEAVING_SIGNALS:
            loop.remove_signal_handler(one)
        leave(number)

    for number in LEAVING_SIGNALS:
        loop.add_signal_handler(number, received, number)
