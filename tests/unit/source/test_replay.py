"""A replay plays at its speed, steps, skips, and jumps from event to event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from runtime.wire.messages import Command
from tests.harness.longrun import BEGIN_S, SpokenRun, create, insert, write
from zerotop.source.base import SourceError
from zerotop.source.replay import LATER_S, SPEEDS, ReplaySource


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replay(tmp_path: Path, clock: Clock) -> Iterator[ReplaySource]:
    """Two minutes with checkpoints at steps 50 and 100, a gap of an hour, and ten seconds more."""
    run = SpokenRun()
    for _ in range(120):
        run.second()
    run.jump(3600)
    for _ in range(10):
        run.second()
    source = ReplaySource(write(tmp_path, run), "q1", clock)
    source.start()
    source.poll()
    yield source
    source.close()


def wait(replay: ReplaySource, clock: Clock, seconds: float) -> bool:
    clock.now_s += seconds
    return replay.poll()


def test_it_stands_at_the_beginning_until_it_plays(replay: ReplaySource, clock: Clock) -> None:
    assert replay.frames == 132 and replay.frame == 0
    assert not wait(replay, clock, 60) and replay.state.step == 1
    replay.toggle()
    assert wait(replay, clock, 10) and (replay.frame, replay.state.step) == (10, 11)
    assert not wait(replay, clock, 0.5) and wait(replay, clock, 0.5) and replay.state.step == 12


@pytest.mark.parametrize(("changes", "speed", "steps"), [(0, 1.0, 21), (3, 8.0, 120), (-2, 0.25, 6), (-9, 0.25, 6)])
def test_the_speed_is_recorded_seconds_per_second(
    replay: ReplaySource, clock: Clock, changes: int, speed: float, steps: int
) -> None:
    for _ in range(abs(changes)):
        replay.change_speed(1 if changes > 0 else -1)
    assert replay.speed == speed
    replay.toggle()
    for _ in range(80 if changes <= 0 else 60):
        wait(replay, clock, 0.25)
    assert replay.state.step == steps


def test_a_gap_takes_no_time_and_the_end_pauses(replay: ReplaySource, clock: Clock) -> None:
    replay.go_to(BEGIN_S + 119)
    replay.toggle()
    for _ in range(4):
        wait(replay, clock, 1)
    assert replay.wall_s > BEGIN_S + 3600 and replay.state.step >= 121
    for _ in range(int(30 + LATER_S)):
        wait(replay, clock, 1)
    assert not replay.playing and replay.state.step == 130
    replay.toggle()
    assert replay.playing and replay.state.step == 1


def test_steps_and_skips(replay: ReplaySource) -> None:
    replay.toggle()
    replay.step(1)
    assert not replay.playing and replay.state.step == 2
    replay.skip(10)
    assert replay.state.step == 12
    replay.skip(-10)
    assert replay.state.step == 2
    replay.step(-5)
    assert replay.state.step == 1
    replay.go_to(BEGIN_S + 60.5)
    assert replay.state.step == 61
    replay.skip(100_000)
    assert replay.state.step == 130


def test_from_event_to_event(replay: ReplaySource) -> None:
    found = []
    while (mark := replay.go_to_mark(1)) is not None:
        assert mark in replay.marks_in_frame()
        found.append((mark.what, replay.state.step))
    assert found == [("checkpoint", 51), ("checkpoint", 101)]  # saved while the next step was taken
    assert [mark.what for mark in replay.marks] == ["state", "start", "checkpoint", "checkpoint"]
    assert replay.next_mark is None and replay.go_to_mark(1) is None
    assert replay.go_to_mark(-1) is not None and replay.state.step == 51
    assert replay.next_mark is not None and replay.next_mark.text.startswith("checkpoint at step 100")


def test_a_command_is_rejected(replay: ReplaySource) -> None:
    replay.send(Command(id="c9", name="pause"))
    assert replay.state.commands["c9"].ack.reason == "this is a replay: nothing reaches the run"
    assert not replay.can_control


def test_a_recording_that_grows_goes_on(tmp_path: Path, clock: Clock) -> None:
    run = SpokenRun()
    for _ in range(10):
        run.second()
    source = ReplaySource(write(tmp_path, run), "q1", clock)
    with closing(source):
        source.start()
        source.go_to(source.extent().end_s)
        assert source.state.step == 10
        for _ in range(5):
            run.second()
        with closing(create(tmp_path / "recording.sqlite")) as database:
            insert(database, run.take())
        source.toggle()
        source.go_to(source.extent().end_s)
        for _ in range(10):
            wait(source, clock, 1)
        assert source.state.step == 15


def test_a_run_without_a_recording_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="q1 has no recording"):
        ReplaySource(tmp_path, "q1").start()
    (tmp_path / "recording.sqlite").touch()
    with pytest.raises(SourceError, match="is empty"):
        ReplaySource(tmp_path, "q1").start()
    (tmp_path / "recording.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(SourceError, match="can't read the recording"):
        ReplaySource(tmp_path, "q1").start()


def test_speeds_are_in_order() -> None:
    assert list(SPEEDS) == sorted(SPEEDS) and 1.0 in SPEEDS and SPEEDS[0] == 0.25
