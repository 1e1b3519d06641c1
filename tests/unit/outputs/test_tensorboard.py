"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.config.outputs import WriterConfig
from tests.harness.packages import needs
from zerotop.outputs.points import Point
from zerotop.outputs.trackers.base import About
from zerotop.outputs.trackers.tensorboard import TensorBoard

needs("tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def about(folder: Path, after: int = 0) -> About:
    return About("r1", "r1", "0" * 16, folder / "run", folder, after)


def write(folder: Path, first: int, last: int, loss: float, after: int = 0) -> None:
    tracker = TensorBoard(WriterConfig(type="tensorboard", folder="tb"))
    assert tracker.open(about(folder, after)) == f"tensorboard --logdir {folder / 'tb'}"
    tracker.write([Point(step, float(step), {"train/loss": loss, "speed/step_s": 0.5}) for step in range(first, last)])
    tracker.close(True)


def test_points_arrive(tmp_path: Path) -> None:
    write(tmp_path, 1, 4, 2.0)
    assert scalars(tmp_path / "tb" / "r1") == {
        "train/loss": [(1, 2.0), (2, 2.0), (3, 2.0)],
        "speed/step_s": [(1, 0.5), (2, 0.5), (3, 0.5)],
    }


def test_steps_that_a_resumed_run_takes_again_replace_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, 9, 2.0)
    # Files are read in the order of their names, which begin with the second in which they were made.
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10)
    write(tmp_path, 6, 8, 1.0, after=5)
    assert scalars(tmp_path / "tb" / "r1")["train/loss"] == [
        (1, 2.0),
        (2, 2.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
        (6, 1.0),
        (7, 1.0),
    ]
