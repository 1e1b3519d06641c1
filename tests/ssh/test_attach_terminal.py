"""`zerotop attach user@box` in a terminal: the real screen over a real sshd, in a pseudo-terminal."""

from __future__ import annotations

import sys

import psutil

from tests.harness.fakehub import FakeHub, step_result
from tests.harness.terminal import Terminal
from tests.harness.waiting import patient
from tests.ssh.conftest import Box
from zerotop.rundir.paths import sockets_home


def test_the_screen_over_ssh(box: Box, hub: FakeHub) -> None:
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
        psutil.wait_procs(children, timeout=patient(10))
        assert not [child for child in children if child.is_running()]
    finally:
        terminal.close()
    assert not list(sockets_home().glob(f"ssh-{terminal.process.pid}-*"))
