"""The thread of a tracker: what it passes on, tries again, drops, and says. And each tracker with its real package,
where that is installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime.config.outputs import WriterConfig
from tests.harness.waiting import patient, until
from zerotop.outputs.points import Point
from zerotop.outputs.trackers import base
from zerotop.outputs.trackers.base import About, TrackerThread
from zerotop.outputs.trackers.make import TRACKERS

IDENTITY = "0123456789abcdef"


class Kept:
    """A tracker that keeps what it is given; `fails` are the errors of the next writes."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.closed: list[bool] = []
        self.fails: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self) -> None:
        """Nothing to import."""

    def open(self, about: About) -> str:
        return f"at {about.name}"

    def write(self, points: Sequence[Point]) -> None:
        self.gate.wait(patient(30))
        if self.fails:
            raise self.fails.pop(0)
        self.points += points

    def close(self, good: bool) -> None:
        self.closed.append(good)


class Played:
    def __init__(self, **more: Any) -> None:
        self.tracker = Kept()
        self.reports: list[str] = []
        settings = {"retries_s": (0.01, 0.01, 0.01), **more}
        self.thread = TrackerThread(
            "kept", self.tracker, lambda: about(Path()), lambda text, severity: self.reports.append(text), **settings
        )

    def put(self, *steps: int, name: str = "train/loss") -> None:
        for step in steps:
            self.thread.put(point(step, name))

    def close(self, good: bool = True, within_s: float = 10.0) -> list[int]:
        self.thread.close(good, time.monotonic() + patient(within_s))
        return [one.step for one in self.tracker.points]


def about(folder: Path, after: int = 0) -> About:
    return About("r1", "r1", IDENTITY, folder / "run", folder, after, {"learning_rate": 0.001, "model": "tiny"})


def point(step: int, name: str = "train/loss") -> Point:
    return Point(step, 1_700_000_000.0 + step, {name: 1 / step})


def test_points_arrive_in_order_and_the_end_is_told() -> None:
    run = Played()
    run.put(*range(1, 1001))
    assert run.close(good=False) == list(range(1, 1001))
    assert run.tracker.closed == [False] and run.reports == ["kept: at r1"]


def test_an_interval_thins_steps_and_no_evaluations() -> None:
    run = Played(interval=10)
    run.put(*range(1, 31))
    run.put(33, name="eval/loss")
    assert run.close() == [10, 20, 30, 33]


def test_a_write_that_fails_is_tried_again_with_the_same_points() -> None:
    run = Played()
    run.tracker.fails = [ConnectionError("no route"), ConnectionError("no route")]
    run.put(1)
    until(lambda: run.tracker.points, "the third try")
    run.put(2)
    assert run.close() == [1, 2]
    assert run.reports[1:] == ["kept: ConnectionError: no route; trying again"] * 2


def test_after_some_tries_it_is_off_and_says_so() -> None:
    run = Played()
    run.tracker.fails = [ValueError("first line\nsecond")] * 4
    run.put(1)
    until(lambda: run.reports[-1:] == ["kept is off: ValueError: first line"], "the last report")
    run.put(*range(2, 100))
    assert run.close() == [] and run.tracker.closed == []


def test_a_slow_tracker_holds_up_nobody_and_loses_points_that_are_counted() -> None:
    run = Played()
    run.tracker.gate.clear()
    began = time.monotonic()
    run.put(*range(1, base.QUEUED + base.BATCH + 500))
    assert time.monotonic() - began < patient(5)
    assert any("kept does not keep up: 1 points dropped so far" in text for text in run.reports)
    run.thread.close(True, time.monotonic() + 0.2)
    assert "kept was not done in time at the end of the run" in run.reports[-1]
    run.tracker.gate.set()


def test_a_run_without_a_step_opens_nothing() -> None:
    run = Played()
    assert run.close() == [] and run.reports == []


# ---- the real packages -----------------------------------------------------------------------------------------------
@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the packages may leave what they like, and the current folder."""
    for name in ("HOME", "TRACKIO_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    yield tmp_path


def write_twice(kind: str, folder: Path, **more: str) -> list[str]:
    """Steps 1 to 5, and as a second attempt 4 to 8; what was reported."""
    reports: list[str] = []
    for after, last in ((0, 5), (3, 8)):
        tracker = TRACKERS[kind](WriterConfig.model_validate({"type": kind, "project": "zt", **more}))
        thread = TrackerThread(
            kind, tracker, lambda after=after: about(folder, after), lambda text, _: reports.append(text)
        )
        for step in range(after + 1, last + 1):
            thread.put(point(step))
        thread.close(True, time.monotonic() + patient(90))
    return reports


@pytest.mark.filterwarnings("default")
def test_mlflow(own_home: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{own_home}/mlflow.db"
    reports = write_twice("mlflow", own_home, uri=uri)
    assert reports == [f"mlflow: experiment zt, run r1 at {uri}"] * 2
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("zt").experiment_id])
    assert (run.info.run_name, run.info.status) == ("r1", "FINISHED")
    assert run.data.params == {"learning_rate": "0.001", "model": "tiny"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {one.step: one.value for one in history} == {step: 1 / step for step in range(1, 9)}


@pytest.mark.filterwarnings("default")
def test_trackio(own_home: Path) -> None:
    pytest.importorskip("trackio")
    import sqlite3

    reports = write_twice("trackio", own_home)
    assert reports == ["trackio: trackio show --project zt"] * 2
    (path,) = (own_home / "trackio_dir").glob("*.db")
    database = sqlite3.connect(path)
    rows = database.execute("SELECT step, metrics FROM metrics").fetchall()
    database.close()
    assert {step for step, _ in rows} == set(range(1, 9))


@pytest.mark.filterwarnings("default")
def test_wandb_offline(own_home: Path) -> None:
    pytest.importorskip("wandb")
    reports = write_twice("wandb", own_home)
    assert len(reports) == 2 and all(text.startswith("wandb: W&B, offline, in ") for text in reports)
    assert len(list((own_home / "run" / "wandb").glob(f"offline-run-*-{IDENTITY}/*.wandb"))) >= 1
