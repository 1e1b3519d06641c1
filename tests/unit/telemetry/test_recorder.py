"""Phases, collectives and step results as the training thread leaves them."""

from __future__ import annotations

import threading

import pytest

from runtime.telemetry import recorder as module
from runtime.telemetry.recorder import COLLECTIVES_KEPT, SPANS_KEPT, STEPS_KEPT, Recorder
from tests.harness.fakehub import step_result


class Clock:
    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns

    def pass_ms(self, ms: int) -> None:
        self.ns += ms * 1_000_000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic_ns", clock)
    return clock


def test_phases_are_intervals_without_gap_or_overlap(clock: Clock) -> None:
    recorder = Recorder()
    clock.pass_ms(1)
    recorder.enter("data", step=3, micro_step=1)
    clock.pass_ms(2)
    recorder.enter("forward")
    clock.pass_ms(3)
    recorder.enter("backward", micro_step=2)
    clock.pass_ms(4)
    recorder.enter("idle", step=4, micro_step=0)
    start = 1_000_000_000
    assert recorder.drain().spans == [
        ("init", 0, 0, start, start + 1_000_000),
        ("data", 3, 1, start + 1_000_000, start + 3_000_000),
        ("forward", 3, 1, start + 3_000_000, start + 6_000_000),
        ("backward", 3, 2, start + 6_000_000, start + 10_000_000),
    ]
    assert recorder.drain().spans == []


def test_a_nested_phase_is_not_counted_twice(clock: Clock) -> None:
    recorder = Recorder()
    recorder.enter("backward", step=1, micro_step=1)
    clock.pass_ms(10)
    with recorder.span("reduce"):
        clock.pass_ms(5)
        with recorder.span("offload"):
            clock.pass_ms(2)
        clock.pass_ms(1)
    clock.pass_ms(3)
    recorder.step(step_result())
    drained = recorder.drain()
    assert drained.steps[0].phase_ms == {"backward": 13.0, "reduce": 6.0, "offload": 2.0}
    assert [span[0] for span in drained.spans] == ["init", "backward", "reduce", "offload", "reduce"]
    assert recorder.position().phase == "backward"


def test_the_outer_phase_goes_on_after_an_error_and_keeps_a_newer_step(clock: Clock) -> None:
    recorder = Recorder()
    recorder.enter("idle", step=1)
    with pytest.raises(RuntimeError, match="disk full"), recorder.span("checkpoint"):
        recorder.enter("checkpoint", step=2)
        raise RuntimeError("disk full")
    position = recorder.position()
    assert (position.phase, position.step) == ("idle", 2)


def test_a_step_counts_only_what_came_after_the_last_one(clock: Clock) -> None:
    recorder = Recorder()
    recorder.enter("step", step=1)
    clock.pass_ms(4)
    recorder.step(step_result(step=1))
    clock.pass_ms(3)  # still in the phase of the first step
    recorder.enter("forward", step=2)
    clock.pass_ms(2)
    seq = recorder.issued("all_reduce", 100)
    recorder.completed(seq, "all_reduce", 100, clock.ns, clock.ns + 5_000_000, 1_500_000)
    recorder.step(step_result(step=2))
    first, second = recorder.drain().steps
    assert first.phase_ms == {"step": 4.0}  # what came before the first step is no part of it
    assert (first.wait_ms, first.comm_bytes) == (0.0, 0)
    assert second.phase_ms == {"step": 3.0, "forward": 2.0}
    assert (second.wait_ms, second.comm_bytes) == (1.5, 100)


def test_figures_that_the_engine_gives_stay(clock: Clock) -> None:
    recorder = Recorder()
    clock.pass_ms(4)
    recorder.issued("all_reduce", 100)
    recorder.step(step_result(phase_ms={"forward": 7.0}, wait_ms=2.0, comm_bytes=8))
    result = recorder.drain().steps[0]
    assert (result.phase_ms, result.wait_ms, result.comm_bytes) == ({"forward": 7.0}, 2.0, 8)


def test_a_collective_lasts_from_the_later_of_issue_and_previous_completion() -> None:
    recorder = Recorder()
    first, second, third = (recorder.issued("reduce_scatter", 64) for _ in range(3))
    assert (first, second, third) == (1, 2, 3)
    recorder.completed(first, "reduce_scatter", 64, 1_000_000, 5_000_000, 0)
    recorder.completed(second, "reduce_scatter", 64, 2_000_000, 9_000_000, 250_000)  # queued behind the first
    recorder.completed(third, "reduce_scatter", 64, 10_000_000, 12_000_000, 0)
    durations = [(record[0], record[5], record[6]) for _, record in recorder.drain().collectives]
    assert durations == [(1, 4000, 0), (2, 4000, 250), (3, 2000, 0)]


def test_crossing_end_times_never_make_a_duration_negative() -> None:
    recorder = Recorder()
    recorder.completed(1, "all_gather", 1, 0, 5_000_000, 0)
    recorder.completed(2, "all_gather", 1, 1_000_000, 4_999_000, 0)
    recorder.completed(3, "all_gather", 1, 2_000_000, 7_000_000, 0)
    assert [record[5] for _, record in recorder.drain().collectives] == [5000, 0, 2000]


def test_a_collective_belongs_to_the_step_that_issued_it() -> None:
    recorder = Recorder()
    recorder.enter("backward", step=7)
    seq = recorder.issued("all_reduce", 4)
    recorder.enter("forward", step=8)
    position = recorder.position()
    assert (position.entered_seq, position.entered_op, position.completed_seq) == (seq, "all_reduce", 0)
    recorder.completed(seq, "all_reduce", 4, 0, 1000, 0)
    assert [step for step, _ in recorder.drain().collectives] == [7]
    assert recorder.position().completed_seq == seq


def test_a_full_ring_keeps_the_newest_and_counts_the_rest() -> None:
    recorder = Recorder()
    for _ in range(SPANS_KEPT + 5):
        recorder.enter("forward")
    for seq in range(1, COLLECTIVES_KEPT + 3):
        recorder.completed(seq, "all_reduce", 1, 0, seq, 0)
    for step in range(1, STEPS_KEPT + 2):
        recorder.step(step_result(step=step))
    drained = recorder.drain()
    assert len(drained.spans) == SPANS_KEPT
    assert drained.spans[0][0] == "forward", "the oldest span (init) fell out"
    assert drained.collectives[-1][1][0] == COLLECTIVES_KEPT + 2
    assert drained.steps[0].step == 2
    assert drained.dropped == 5 + 2 + 1
    recorder.enter("backward")
    assert recorder.drain().dropped == 8, "dropped is a total and does not grow without a loss"


def test_nothing_is_lost_uncounted_when_writer_and_reader_race() -> None:
    recorder = Recorder()
    written = 60_000
    received = 0

    def write() -> None:
        for _ in range(written):
            recorder.enter("forward")

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        drained = recorder.drain()
        received += len(drained.spans)
        assert received + drained.dropped <= written
    writer.join()
    drained = recorder.drain()
    assert received + len(drained.spans) + drained.dropped == written
