"""A program in a pseudo-terminal: what it shows there, and what is typed into it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Callable
from typing import Any

import pyte

from tests.harness import ROOT
from tests.harness.waiting import patient, until

ALTERNATE_SCREEN = (b"\x1b[?1049h", b"\x1b[?1049l")  # on, off


class Terminal:
    """`shown` is all that the program has written, without escape sequences, and below it the screen as it stands: a
    program that sends only changed cells writes no whole words. `raw` is all that came."""

    def __init__(self, words: list[str], size: tuple[int, int] = (120, 36), **streams: Any) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **streams}
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **streams)
        os.close(theirs)
        self.raw = b""
        self._screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self._screen)
        self._fed = 0

    @property
    def shown(self) -> str:
        text = self.raw.decode(errors="replace")
        written = re.sub(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\x1b[()=>].?", "", text)
        self._stream.feed(self.raw[self._fed :])  # only now: it is slow, and `read` is also timed
        self._fed = len(self.raw)
        return "\n".join([written, *self._screen.display])

    @property
    def in_alternate_screen(self) -> bool:
        on, off = (self.raw.rfind(code) for code in ALTERNATE_SCREEN)
        return on > off

    def read_until(self, condition: Callable[[], bool], within_s: float = 60.0) -> None:
        until(condition, lambda: self.shown[-6000:], within_s, pause=self.read)

    def read(self, wait_s: float) -> None:
        """Read what comes within `wait_s`, once."""
        if select.select([self._ours], [], [], wait_s)[0] and not self._take():
            self.process.wait(patient(20))

    def _take(self) -> bool:
        """Read what is there. False: the program has left its terminal (EIO)."""
        try:
            came = os.read(self._ours, 65536)
        except OSError:
            return False
        self.raw += came
        return True

    def read_to_the_end(self) -> int:
        self.read_until(lambda: self.process.poll() is not None)
        while select.select([self._ours], [], [], 0)[0] and self._take():
            pass
        return self.process.wait(patient(20))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def hang_up(self) -> None:
        os.close(self._ours)
        self._ours = -1

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(patient(10))
        if self._ours >= 0:
            os.close(self._ours)
