"""Attaching to, listing and steering runs on another box, through a real sshd."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from runtime.wire.messages import Command, RunStatus
from runtime.wire.rundir import write_json
from tests.harness.fakehub import FakeHub, hello, step_result
from tests.harness.waiting import until
from tests.ssh.conftest import ROOT, Box
from zerotop.cli import main
from zerotop.hub.recorder import Recorder
from zerotop.output import CommandError
from zerotop.rundir.paths import sockets_home
from zerotop.source.remote import RemoteSource, open_remote


def polled(source: RemoteSource, condition: Callable[[], bool]) -> Callable[[], bool]:
    def check() -> bool:
        source.poll()
        return condition()

    return check


@pytest.fixture
def source(box: Box, hub: FakeHub) -> Iterator[RemoteSource]:
    source = open_remote(box.target, "q1")
    yield source
    source.close()


def test_attach_sees_the_run_and_steers_it(source: RemoteSource, hub: FakeHub) -> None:
    until(polled(source, lambda: source.connection == "live"))
    assert source.state.world_size == 2
    hub.publish(step_result(0, 8), step_result(1, 8))
    until(polled(source, lambda: source.state.step == 8))
    source.send(Command(id="c1", name="pause"))
    until(polled(source, lambda: "c1" in source.state.commands and source.state.commands["c1"].ack.state == "applied"))
    assert hub.commands[0].name == "pause"


def test_nothing_listens_on_tcp_and_nobody_else_may_look(source: RemoteSource) -> None:
    until(polled(source, lambda: source.connection == "live"))
    assert source.link._process is not None
    own = [psutil.Process(), psutil.Process(source.link._process.pid)]
    listening = [c for process in own for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    assert source.link.folder.stat().st_mode & 0o777 == 0o700
    assert source.link.sockets.path("screens").stat().st_mode & 0o077 == 0


def test_a_broken_connection_comes_back(source: RemoteSource, hub: FakeHub) -> None:
    until(polled(source, lambda: source.connection == "live"))
    assert source.link._process is not None
    first = source.link._process.pid
    psutil.Process(first).kill()
    until(polled(source, lambda: source.connection.startswith("lost: ")))
    hub.publish(step_result(0, 12), step_result(1, 12))
    until(polled(source, lambda: source.connection == "live" and source.state.step == 12))
    assert source.link._process.pid != first
    source.send(Command(id="c2", name="resume"))
    until(polled(source, lambda: "c2" in source.state.commands))


def test_a_run_that_dies_without_a_word_is_noticed(source: RemoteSource, hub: FakeHub, box: Box) -> None:
    until(polled(source, lambda: source.connection == "live"))
    hub.close()
    died = RunStatus(name="q1", state="failed", reason="the supervisor died")
    write_json(box.state_home / "zerotop" / "runs" / "q1" / "state.json", died)
    until(polled(source, lambda: source.connection == "ended"))
    assert source.state.status is not None
    assert source.state.status.reason == "the supervisor died"


def test_close_leaves_nothing(box: Box, hub: FakeHub) -> None:
    source = open_remote(box.target, None)
    folder = source.link.folder
    assert source.link._process is not None
    ssh = psutil.Process(source.link._process.pid)
    assert folder.is_dir()
    source.close()
    source.close()
    assert not folder.exists()
    assert not ssh.is_running()


def test_ssh_ends_with_a_killed_screen(box: Box, hub: FakeHub) -> None:
    program = (
        "import sys, time\nfrom zerotop.source.remote import open_remote\n"
        f"source = open_remote({box.target!r}, 'q1')\nprint(source.link._process.pid, source.link.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    screen = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert screen.stdout is not None
        pid, folder = screen.stdout.readline().split()
        ssh = psutil.Process(int(pid))
        assert Path(folder).is_dir()
    finally:
        screen.kill()
        screen.wait()
        assert screen.stdout is not None
        screen.stdout.close()
    until(lambda: not ssh.is_running() or ssh.status() == psutil.STATUS_ZOMBIE, what="ssh outlived the screen")
    open_remote(box.target, "q1").close()  # SIGKILL leaves the files; the next one tidies up
    assert not Path(folder).exists()


def test_ls(box: Box, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", box.target, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["state"], run["step"]) for run in listed] == [("q1", "running", 3)]
    assert main(["ls", box.target]) == 0
    assert "q1" in capsys.readouterr().out


def test_status_and_commands_reach_the_run(box: Box, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", f"{box.target}:q1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ranks"]) == 2
    assert main(["set", f"{box.target}:q1", "log_interval=5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "applied"
    assert hub.commands[0].arguments == {"log_interval": 5}
    assert main(["set", f"{box.target}:q1", "log_interval=-5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "rejected"
    assert len(hub.commands) == 1


def test_unknown_run(box: Box, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandError, match=r"there is no run called 'nope'. Runs: q1 \(running\)"):
        open_remote(box.target, "nope")
    assert main(["status", f"{box.target}:nope", "--json"]) == 2
    assert "no run called" in json.loads(capsys.readouterr().out)["error"]


def test_a_run_that_has_ended_comes_from_its_recording_there(box: Box) -> None:
    status = RunStatus(name="old", state="finished", step=200, reason="all steps done")
    run = box.write_run("old", Path("/nowhere"), status)
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    for message in (hello(0), hello(1), step_result(0, 200, loss=math.nan), step_result(1, 200, loss=math.nan)):
        recorder.add("rank/0", message)
    recorder.close()
    for name in ("old", None):  # without a name, and with nothing live there, the newest is meant
        source = open_remote(box.target, name)
        assert source.connection == "ended" and not source.can_control
        assert source.state.step == 200 and source.state.world_size == 2 and math.isnan(source.state.loss or 0.0)
        assert source.state.status == status
        source.close()


def test_refusals_say_why(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandError, match=r"ssh to nobody failed: .*refused"):
        open_remote("nobody", None)
    # Host keys are ssh's business: an unknown one is refused as the user's settings say.
    with pytest.raises(CommandError, match=r"ssh to strange failed: .*verification failed"):
        open_remote("strange", None)
    assert main(["ls", "nobody"]) == 2
    assert "ssh to nobody failed" in capfd.readouterr().err
    assert main(["ls", "--", "-oProxyCommand=true"]) == 2


def test_a_box_without_zerotop_says_so(box: Box, capfd: pytest.CaptureFixture[str]) -> None:
    (box.state_home / "zerotop" / "executable").write_text("/nowhere/python\n")
    assert main(["ls", box.target]) == 2
    assert "there is no zerotop on" in capfd.readouterr().err
    with pytest.raises(CommandError, match="no zerotop found"):
        open_remote(box.target, None)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not list(sockets_home().glob(f"ssh-{os.getpid()}-*"))
