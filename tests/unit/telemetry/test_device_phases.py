"""Phases by a device's time, with a device that is played: it takes as long for work as the test says, however soon the
training thread has launched it."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from runtime.telemetry.device_phases import MARKS_KEPT, MOST_HELD
from runtime.telemetry.recorder import Recorder
from runtime.wire.messages import StepResult
from zerotop.state.breakdown import breakdown_of

MS = 1_000_000


class PlayedDevice:
    """Its compute stream: work, and marks between it. Host and device have one clock, in ms."""

    def __init__(self) -> None:
        self.now = self.free_at = 0.0
        self.runs = True
        self._queued: deque[Any] = deque()

    def launch(self, ms: float) -> None:
        """Give the stream work that takes so long; the host goes on at once."""
        self.free_at = max(self.free_at, self.now) + ms

    def host(self, ms: float) -> None:
        """The host is busy, or asleep, for so long."""
        self.now += ms

    def wait(self) -> None:
        """The host waits for the device."""
        self.now = max(self.now, self.free_at)

    # ---- Marks -----------------------------------------------------------------------------------------------------
    def mark(self) -> float:
        self.free_at = max(self.free_at, self.now)
        return self.free_at

    def reached(self, mark: float) -> bool:
        return mark <= self.now

    def ns(self, mark: float) -> int:
        return int(mark * MS)


@pytest.fixture
def device() -> PlayedDevice:
    return PlayedDevice()


@pytest.fixture
def recorder(device: PlayedDevice) -> Recorder:
    made = Recorder()
    made.follow_device(device)
    return made


def result(step: int) -> StepResult:
    return StepResult(rank=0, step=step, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=1.0, end_ns=0)


def one_step(
    recorder: Recorder, device: PlayedDevice, step: int, load_ms: float = 0.0, wait_ms: float = 0.0, ms: float = 100.0
) -> None:
    """Forward and backward of `ms` each, an exposed wait, and an update of 10 ms, all launched within a millisecond."""
    recorder.enter("data", step, 0)
    device.host(load_ms)
    recorder.enter("forward", step, 1)
    device.launch(ms)
    recorder.enter("backward")
    device.launch(ms)
    sequence = recorder.issued("reduce_scatter", 1 << 20)
    with recorder.span("reduce"):
        place = recorder.place
        device.launch(wait_ms)
    recorder.enter("step")
    device.launch(10.0)
    device.host(1.0)
    recorder.completed(sequence, "reduce_scatter", 1 << 20, 0, 1, int(wait_ms * MS), place)
    recorder.step(result(step))


def finished(recorder: Recorder, device: PlayedDevice, steps: int) -> list[StepResult]:
    """The results, once the device has come to the end of the last step."""
    recorder.enter("data", steps + 1, 0)
    device.wait()
    return recorder.drain().steps


def test_a_phase_lasts_as_long_as_the_device_takes_for_it(recorder: Recorder, device: PlayedDevice) -> None:
    one_step(recorder, device, 1, wait_ms=50.0)
    (found,) = finished(recorder, device, 1)
    assert found.phase_ms == {"data": 0.0, "forward": 100.0, "backward": 100.0, "reduce": 50.0, "step": 10.0}
    assert found.phase_wait_ms == {"reduce": 50.0} and found.wait_ms == 50.0
    parts = breakdown_of(found)
    assert (parts.compute, parts.exposed, parts.optimizer, parts.step_ms) == (200.0, 50.0, 10.0, 260.0)


def test_data_that_is_loaded_while_the_device_is_busy_costs_nothing(recorder: Recorder, device: PlayedDevice) -> None:
    for step in (1, 2, 3):
        one_step(recorder, device, step, load_ms=45.0)
    assert [round(one.phase_ms["data"]) for one in finished(recorder, device, 3)] == [45, 0, 0]


def test_data_that_is_late_is_what_the_device_waits_for(recorder: Recorder, device: PlayedDevice) -> None:
    for step in (1, 2, 3):
        one_step(recorder, device, step, load_ms=300.0)
    late = 300.0 - 210.0 + 1.0  # it has begun a millisecond after the launches
    assert [one.phase_ms["data"] for one in finished(recorder, device, 3)][1:] == [late, late]


def test_a_step_is_told_when_the_device_has_finished_it(recorder: Recorder, device: PlayedDevice) -> None:
    one_step(recorder, device, 1)
    recorder.enter("data", 2, 0)
    assert recorder.drain().steps == []
    device.host(150.0)
    half = recorder.drain()
    assert half.steps == [] and [span[0] for span in half.spans[-1:]] == ["forward"]
    device.wait()
    rest = recorder.drain()
    assert [one.step for one in rest.steps] == [1]
    assert rest.spans[-1] == ("step", 1, 1, 200 * MS, 210 * MS)


def test_a_step_is_told_after_its_collectives_are_reported(recorder: Recorder, device: PlayedDevice) -> None:
    recorder.enter("forward", 1, 1)
    sequence = recorder.issued("reduce_scatter", 8)
    with recorder.span("reduce"):
        place = recorder.place
        device.launch(5.0)
    recorder.step(result(1))
    recorder.enter("data", 2, 0)
    device.wait()
    assert recorder.drain().steps == []
    recorder.completed(sequence, "reduce_scatter", 8, 0, 1, 4 * MS, place)  # when the next one is issued
    (found,) = recorder.drain().steps
    assert found.phase_wait_ms == {"reduce": 4.0}


def test_a_collective_that_is_never_waited_for_holds_up_few_steps(recorder: Recorder, device: PlayedDevice) -> None:
    recorder.issued("all_gather", 8)
    told = []
    for step in range(1, 6):
        recorder.enter("forward", step, 1)
        device.launch(5.0)
        recorder.step(result(step))
        recorder.enter("data", step + 1, 0)
        device.wait()
        told += recorder.drain().steps
    assert [one.step for one in told] == list(range(1, 6 - MOST_HELD))
    told += recorder.drain(final=True).steps
    assert [one.step for one in told] == [1, 2, 3, 4, 5]
    assert {one.phase_ms["forward"] for one in told} == {5.0}


def test_a_step_before_the_first_mark_has_the_times_of_the_host(device: PlayedDevice) -> None:
    recorder = Recorder()
    recorder.enter("forward", 1, 1)
    recorder.step(result(1))
    recorder.enter("data", 2, 0)
    recorder.follow_device(device)
    (found,) = recorder.drain(final=True).steps
    assert found.phase_ms.keys() == {"forward"}


def test_marks_that_nobody_asks_for_are_bounded_and_counted(recorder: Recorder, device: PlayedDevice) -> None:
    for _ in range(MARKS_KEPT + 10):
        recorder.enter("forward")
    device.wait()
    found = recorder.drain()
    assert len(found.spans) == MARKS_KEPT - 1 and found.dropped == 11


def test_the_position_is_the_training_threads(recorder: Recorder, device: PlayedDevice) -> None:
    one_step(recorder, device, 1)
    recorder.enter("data", 2, 0)
    at = recorder.position()
    assert (at.phase, at.step) == ("data", 2)
    assert not {"forward", "backward", "step"} & {span[0] for span in recorder.drain().spans}


def test_the_error_of_a_device_stays_the_one_that_is_raised(recorder: Recorder, device: PlayedDevice) -> None:
    def lost() -> float:
        raise RuntimeError("CUDA error: device-side assert triggered, once more")

    recorder.enter("forward", 1, 1)
    with pytest.raises(ZeroDivisionError), recorder.span("reduce"):
        device.mark = lost  # type: ignore[method-assign]
        raise ZeroDivisionError
    assert recorder.position().phase == "forward"
