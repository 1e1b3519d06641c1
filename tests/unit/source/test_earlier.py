"""Earlier runs of the same model: which are found, and what of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness.fakehub import hello, step_result
from tests.harness.fakerun import write_run
from zerotop.hub.recorder import Recorder
from zerotop.rundir.directory import read_entry
from zerotop.source.earlier import RUNS_SHOWN, earlier_runs

MODEL = {"model_name": "gpt-tiny", "parameters": 1000}


def record(home: Path, name: str, started: float, steps: range, loss: float = 2.0, **model: object) -> Path:
    status = RunStatus(name=name, state="finished", started_wall_s=started)
    run = write_run(home, name, Path("/nowhere"), status, created_wall_s=started)
    recorder = Recorder(run / "recording.sqlite", attempt=1)
    recorder.add("rank/0", hello(0, **{**MODEL, **model}))
    for step in steps:
        recorder.add("rank/0", step_result(0, step, loss=loss))
    recorder.close()
    return run


def test_earlier_runs_of_the_same_model_are_found_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for number in range(RUNS_SHOWN + 1):
        record(tmp_path, f"old{number}", 100.0 + number, range(1, 6), loss=float(number))
    record(tmp_path, "larger", 150.0, range(1, 6), parameters=2000)
    record(tmp_path, "later", 300.0, range(1, 6))
    record(tmp_path, "empty", 151.0, range(0))
    own = read_entry(record(tmp_path, "own", 200.0, range(1, 3)))
    found = earlier_runs(own, hello(0, **MODEL))
    assert [run.name for run in found] == ["old3", "old2", "old1"]
    assert found[0].points == tuple((float(step), 3.0) for step in range(1, 6))
    assert earlier_runs(own, hello(0)) == (), "of a model without a size nothing is known"


def test_a_damaged_recording_is_left_out_and_replayed_steps_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    damaged = record(tmp_path, "damaged", 110.0, range(1, 6))
    (damaged / "recording.sqlite").write_bytes(b"no database at all" * 100)
    (damaged / "recording.sqlite-wal").unlink(missing_ok=True)
    run = record(tmp_path, "twice", 100.0, range(1, 5), loss=3.0)
    recorder = Recorder(run / "recording.sqlite", attempt=2)
    for step in (3, 4, 5):
        recorder.add("rank/0", step_result(0, step, loss=1.0))
    recorder.close()
    own = read_entry(record(tmp_path, "own", 200.0, range(1, 3)))
    (found,) = earlier_runs(own, hello(0, **MODEL))
    assert found.name == "twice"
    assert found.points == ((1.0, 3.0), (2.0, 3.0), (3.0, 1.0), (4.0, 1.0), (5.0, 1.0))
