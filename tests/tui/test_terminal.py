"""The real screen of `zerotop attach` in a pseudo-terminal: where it draws, and how it leaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness.fakehub import FakeHub, hello, step_result
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, write
from tests.harness.terminal import Terminal
from tests.harness.waiting import patient
from zerotop.hub.recorder import Recorder

ATTACH = [sys.executable, "-m", "zerotop", "attach"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_screen_draws_on_its_terminal_and_leaves_it_tidy_on_a_signal(
    hub: FakeHub, number: signal.Signals, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as log:
        terminal = Terminal([*ATTACH, "q1"], stderr=log)
        try:
            terminal.read_until(lambda: "step 77 of 200" in terminal.shown)
            assert terminal.in_alternate_screen
            terminal.process.send_signal(number)
            assert terminal.read_to_the_end() == 128 + number
            assert not terminal.in_alternate_screen and b"\x1b[?25h" in terminal.raw and b"\x1b[?2004l" in terminal.raw
        finally:
            terminal.close()
    said = (tmp_path / "log").read_text()
    assert said == ("q1 continues (running): zerotop attach q1 opens it again\n" if number == signal.SIGTERM else "")
    assert hub.commands == []


@pytest.mark.parametrize("signalled", [True, False])
def test_a_terminal_that_is_closed_ends_the_screen_and_nothing_else(hub: FakeHub, signalled: bool) -> None:
    terminal = Terminal([*ATTACH, "q1"])
    try:
        terminal.read_until(lambda: "step 77 of 200" in terminal.shown)
        terminal.hang_up()
        if signalled:  # as a shell's session is; ours has no controlling terminal
            terminal.process.send_signal(signal.SIGHUP)
        assert terminal.process.wait(patient(30)) == 128 + signal.SIGHUP
        assert hub.commands == []
    finally:
        terminal.close()


def test_a_run_that_has_ended_opens_with_its_summary(hub: FakeHub, tmp_path: Path) -> None:
    status = RunStatus(
        name="old", state="failed", step=41, reason="rank 1 was killed", started_wall_s=100.0, ended_wall_s=800.0
    )
    run = write_run(tmp_path, "old", Path("/nowhere"), status)
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    said = (step_result(rank, step) for step in (40, 41) for rank in (0, 1))
    for message in (RunStatus(name="old", state="running", last_checkpoint_step=40), hello(0), hello(1), *said):
        recorder.add("rank/0", message)
    recorder.close()
    terminal = Terminal([*ATTACH, "old"])
    try:
        terminal.read_until(lambda: "11m 40s" in terminal.shown and "✖ old · failed" in terminal.shown)
        assert "the run failed: rank 1 was killed" in terminal.shown and "step 41 of 200" in terminal.shown
        terminal.type("PSAyq")
        assert terminal.read_to_the_end() == 0  # it failed in the past: looking at it did not
        assert "old: failed, rank 1 was killed" in terminal.shown
    finally:
        terminal.close()


def test_without_a_terminal_nothing_is_drawn(hub: FakeHub, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        terminal = Terminal([*ATTACH, "q1"], stdout=out)
        try:
            assert terminal.read_to_the_end() == 2
            assert "needs a terminal" in terminal.shown
        finally:
            terminal.close()
    assert (tmp_path / "out").read_bytes() == b""


def test_zerotop_alone_lists_the_runs_and_comes_back_from_one(hub: FakeHub) -> None:
    terminal = Terminal([sys.executable, "-m", "zerotop"])
    try:
        terminal.read_until(lambda: "▶ running" in terminal.shown and "q1" in terminal.shown)
        terminal.type("\r")
        terminal.read_until(lambda: "step 77 of 200" in terminal.shown)
        before = len(terminal.raw)
        terminal.type("q")
        terminal.read_until(lambda: b"Demo run" in terminal.raw[before:])
        terminal.type("q")
        assert terminal.read_to_the_end() == 0 and not terminal.in_alternate_screen
        assert hub.commands == []
    finally:
        terminal.close()


def test_a_replay_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = SpokenRun()
    for _ in range(30):
        run.second()
    write(write_run(tmp_path, "old", tmp_path, RunStatus(name="old", state="finished", attempt=1)), run)
    terminal = Terminal([sys.executable, "-m", "zerotop", "replay", "old", "--at", "12"])
    try:
        terminal.read_until(lambda: "frame 12/31" in terminal.shown)
        terminal.type("]")
        terminal.type("q")  # only the cells that have changed are sent: what it says at the end tells the step
        assert terminal.read_to_the_end() == 0
        assert "left the replay of old at step 13" in terminal.shown
    finally:
        terminal.close()
