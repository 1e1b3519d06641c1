"""`zerotop attach user@box` in a terminal: the real screen over a real sshd, in a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import psutil

from tests.ssh.conftest import ROOT, Box
from tests.unit.fakehub import FakeHub, step_result
from zerotop.runs.paths import sockets_home


class Terminal:
    """A program in a pseudo-terminal of 120x36; `shown` is all it has written, without escape sequences."""

    def __init__(self, words: list[str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._raw = b""

    @property
    def shown(self) -> str:
        text = self._raw.decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;?<>=]*[A-Za-z]|\x1b[()=>].?", "", text)

    def read_until(self, condition: Callable[[], bool], within_s: float = 40.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, self.shown[-3000:]
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self._raw += os.read(self._ours, 65536)
                except OSError:  # EIO: the program has left its terminal
                    self.process.wait(20)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        os.close(self._ours)


def test_the_screen_over_ssh(box: Box, hub: FakeHub) -> None:
    before = set(sockets_home().glob("ssh-*"))
    hub.publish(step_result(0, 77), step_result(1, 77))
    terminal = Terminal([sys.executable, "-m", "zerotop", "attach", box.target])
    try:
        terminal.read_until(lambda: "step 77 of 200" in terminal.shown)
        terminal.type("P")
        terminal.read_until(lambda: [command.name for command in hub.commands] == ["pause"])
        children = psutil.Process(terminal.process.pid).children(recursive=True)
        assert any("ssh" in child.name() for child in children)
        terminal.type("q")
        terminal.read_until(lambda: terminal.process.poll() is not None)
        assert terminal.process.returncode == 0
        assert f"zerotop attach {box.target}:q1 opens it again" in terminal.shown
        psutil.wait_procs(children, timeout=10)
        assert not [child for child in children if child.is_running()]
    finally:
        terminal.close()
    assert set(sockets_home().glob("ssh-*")) <= before
