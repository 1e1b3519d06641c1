"""Marks and tables of a recording."""

from __future__ import annotations

from pathlib import Path

from runtime.wire.messages import Command
from tests.harness.longrun import BEGIN_S, SpokenRun, write
from zerotop.recording.marks import read_marks
from zerotop.recording.playback import Playback
from zerotop.recording.tables import ranks_table, steps_table


def recorded(folder: Path, run: SpokenRun, seconds: int = 60) -> Path:
    for _ in range(seconds):
        run.second()
    return write(folder, run)


def test_marks_are_what_happened_in_order_and_no_progress_lines(tmp_path: Path) -> None:
    run = SpokenRun()
    for _ in range(10):
        run.second()
    run.log("rank 1 is slow", "warning", rank=1)
    pause = Command(id="c1", name="pause")
    run.accept(pause)
    run.apply_command(pause)
    run.jump(5)
    run.fail(1, "ValueError: no")
    marks = read_marks(write(tmp_path, run))
    assert [(mark.what, mark.severity, mark.text) for mark in marks] == [
        ("state", "info", "running"),
        ("start", "info", "2 ranks on node-a"),
        ("log", "warning", "rank 1 is slow"),
        ("command", "info", "pause applied at step 10"),
        ("state", "info", "paused"),
        ("exit", "error", "rank 1 failed at step 10"),
        ("state", "error", "failed"),
    ]
    assert marks[2].wall_s == BEGIN_S + 10


def test_an_empty_recording_has_no_marks(tmp_path: Path) -> None:
    (tmp_path / "recording.sqlite").touch()
    assert read_marks(tmp_path) == []


def test_the_table_of_steps_has_every_step_of_the_range_and_its_evaluation(tmp_path: Path) -> None:
    run = SpokenRun(finetune=True)
    with Playback(recorded(tmp_path, run)) as playback:
        columns, rows = steps_table(playback, BEGIN_S + 20, BEGIN_S + 30)
        found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["step"] for row in found] == list(range(21, 32))
    by_step = {point.step: point for point in run.state.series}
    assert all(row["loss"] == by_step[row["step"]].loss for row in found)
    assert [row["step"] for row in found if row["evaluation_loss"] is not None] == [25]


def test_the_table_of_ranks_has_every_rank_at_every_frame(tmp_path: Path) -> None:
    run = SpokenRun(ranks=3, gpu=True)
    with Playback(recorded(tmp_path, run)) as playback:
        columns, rows = ranks_table(playback, BEGIN_S + 40, BEGIN_S + 42)
        found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [(row["wall_s"] - BEGIN_S, row["rank"]) for row in found] == [(s, r) for s in (41, 42, 43) for r in range(3)]
    assert [row["step"] for row in found] == [41] * 3 + [42] * 3 + [43] * 3
    assert {row["gpu_power_w"] for row in found} == {640, 641, 642}
