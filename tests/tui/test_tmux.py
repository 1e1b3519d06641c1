"""The real program in tmux, which has ideas of its own about keys, colours and the alternate screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.fakehub import FakeHub, step_result
from tests.harness.runs import StartedRun, end_runs
from tests.harness.waiting import DEADLINE_S, until
from zerotop.rundir.directory import find_run

TMUX = shutil.which("tmux")
pytestmark = pytest.mark.skipif(TMUX is None, reason="needs tmux")


class Tmux:
    """A tmux server of its own with one window."""

    def __init__(self, folder: Path, size: tuple[int, int], words: Sequence[str] = ("attach", "q1")) -> None:
        self._socket = str(folder / "tmux")
        command = [sys.executable, "-m", "zerotop", *words]
        where = ["-x", str(size[0]), "-y", str(size[1]), "-c", str(ROOT)]
        (folder / "tmux.conf").write_text("")
        self.call("-f", str(folder / "tmux.conf"), "new-session", "-d", *where, *command)
        self.call("set-option", "-g", "remain-on-exit", "on")

    def call(self, *words: str) -> str:
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        assert TMUX is not None
        done = subprocess.run(
            [TMUX, "-u", "-S", self._socket, *words], capture_output=True, text=True, env=environment, check=True
        )
        return done.stdout

    @property
    def shown(self) -> str:
        return self.call("capture-pane", "-p")

    def wait_for(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        until(lambda: text in self.shown, lambda: self.shown, deadline_s)

    def close(self) -> None:
        self.call("kill-server")


@pytest.fixture
def tmux(hub: FakeHub) -> Iterator[Tmux]:
    folder = Path(tempfile.mkdtemp(prefix="zt-tmux-", dir="/tmp"))
    window = Tmux(folder, (120, 38))
    yield window
    window.close()
    shutil.rmtree(folder)


def test_the_screen_in_tmux_takes_keys_and_leaves_the_run_alone(tmux: Tmux, hub: FakeHub) -> None:
    tmux.wait_for("step 77 of 200")
    for key, words in (("3", "no phase has ended yet"), ("6", "log and events"), ("7", "lr_factor"), ("1", "6 events")):
        tmux.call("send-keys", key)
        tmux.wait_for(words)
    tmux.call("send-keys", "t")
    tmux.wait_for("as before")
    tmux.call("send-keys", "Down", "Enter")
    until(lambda: "as before" not in tmux.shown, lambda: tmux.shown)
    tmux.call("resize-window", "-x", "80", "-y", "24")
    tmux.wait_for("1-8 Screens")
    assert "step 77 of 200" in tmux.shown
    assert hub.commands == []
    tmux.call("send-keys", "C")
    until(lambda: [command.name for command in hub.commands] == ["checkpoint"], lambda: str(hub.commands))
    tmux.wait_for("applied at step 7")
    tmux.call("send-keys", "q")
    tmux.wait_for("q1 continues (running)")


def test_the_log_file_opens_in_a_pager_at_its_end_and_the_screen_comes_back(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "zerotop" / "runs" / "q1" / "logs" / "1"
    folder.mkdir(parents=True)
    (folder / "rank-0.log").write_text("".join(f"line {number} of rank 0\n" for number in range(500)))
    program = tmp_path / "mypager"  # less may be missing: this one shows the end of the file until Enter
    program.write_text('#!/bin/sh\nclear\ntail -n 5 "$1"\necho "end of $1"\nread answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PAGER", str(program))
    window = Tmux(tmp_path, (120, 38))
    try:
        window.wait_for("step 77 of 200")
        window.call("send-keys", "6")
        window.wait_for("log and events")
        window.call("send-keys", "e")
        window.wait_for("end of ")
        assert "line 499 of rank 0" in window.shown and "log and events" not in window.shown
        hub.publish(step_result(0, 78), step_result(1, 78))
        window.call("send-keys", "q", "Enter")
        window.wait_for("log and events")
        window.wait_for("step 78 of 200")
        assert "line 499" not in window.shown, "what was typed in the pager was not for the screen"
        window.call("send-keys", "1")
        window.wait_for("6 events")
        window.call("send-keys", "q")
        window.wait_for("q1 continues (running)")
    finally:
        window.close()


CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {
        "model": {"preset": "gpt-tiny"},
        "data": {"seq_len": 16, "files": ["text.txt"]},
        "train": {"steps": 100_000},
        "checkpoint": {"interval": 0},
    },
}


@pytest.mark.timeout(240)
def test_a_run_from_its_launch_to_its_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is played: two ranks, their supervisor, and every command by its key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    words = ("launch", str(config), "--nproc", "2", "--device", "cpu", "--name", "real")
    window = Tmux(tmp_path, (120, 38), words)
    run: StartedRun | None = None
    try:
        window.wait_for("the ranks are starting; rank 0: importing torch", 60)
        run = StartedRun(find_run("real"), tmp_path / "no-pids")
        window.wait_for("▶ running", 60)
        window.call("send-keys", "P")
        window.wait_for("paused at step")
        window.call("send-keys", "P")
        window.wait_for("▶ running")
        window.call("send-keys", "C")
        window.wait_for("checkpoint at step", 60)
        window.call("send-keys", "E")
        window.wait_for("log_interval")
        window.call("send-keys", "Escape")
        until(lambda: "change a setting" not in window.shown, lambda: window.shown)  # or both would be Alt+S
        window.call("send-keys", "S")
        window.wait_for("stop real?")
        window.call("send-keys", "y")
        window.wait_for("■ real · stopped", 60)
        window.call("send-keys", "q")
        window.wait_for("real: stopped")
        assert run.see_end("stopped").last_checkpoint_step is not None
    finally:
        window.close()
        end_runs([run] if run is not None else [])
