"""Runs of fake and of real ranks under the real supervisor, in a state home of their own; every process of them is gone
afterwards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.runs import StartedRun, end_runs
from zerotop.launch.start import start_run
from zerotop.rundir.directory import read_entry
from zerotop.rundir.paths import remove_sockets

FAKE_RANK = ROOT / "tests" / "harness" / "fake_rank.py"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StartedRun]]:
    """`start(FAKE_STEPS=50, ...)`: a two-rank fake run with this environment; `launch` are start_run's own
    arguments."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1}))
    runs: list[StartedRun] = []

    def begin(launch: dict[str, object] | None = None, **environment: object) -> StartedRun:
        pids_file = tmp_path / f"pids-{len(runs)}"
        monkeypatch.setenv("FAKE_PIDS", str(pids_file))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        arguments: dict[str, object] = {
            "nproc": 2,
            "device": "cpu",
            "command": [sys.executable, str(FAKE_RANK), "--ranks", "2"],
        }
        entry = start_run(**{"config_path": config, **arguments, **(launch or {})})  # type: ignore[arg-type]
        for name in environment:
            monkeypatch.delenv(name)
        runs.append(StartedRun(entry, pids_file))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()
        if _was_killed(run):
            remove_sockets(run.entry.sockets.folder)
        assert not run.entry.sockets.folder.exists()


def _was_killed(run: StartedRun) -> bool:
    """A killed supervisor can't clear up; the next launch does."""
    return "supervisor died" in read_entry(run.path).status.reason


@pytest.fixture
def launch_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StartedRun]]:
    """`launch_real(config, name=..., ...)`: a run of two real ranks on the CPU; text.txt is theirs to learn."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    path = tmp_path / "config.json"
    runs: list[StartedRun] = []

    def begin(config: dict[str, object], **arguments: object) -> StartedRun:
        path.write_text(json.dumps(config))
        entry = start_run(**{"config_path": path, "nproc": 2, "device": "cpu", **arguments})  # type: ignore[arg-type]
        runs.append(StartedRun(entry, tmp_path / "no-pids"))
        return runs[-1]

    yield begin
    end_runs(runs)
