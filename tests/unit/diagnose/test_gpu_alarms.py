"""Events about the GPUs of the run: when something begins, when it is over, and not at every flicker."""

from __future__ import annotations

from typing import Any

from runtime.wire.messages import RunStatus
from tests.unit.diagnose.test_hang import PlayedHub
from tests.unit.state.test_gpu import a_run, gpu, node
from zerotop.diagnose.gpu_alarms import BEGINS_S, ENDS_S, GpuAlarms

HOT: dict[str, Any] = {"clock_reasons": ["hot (hardware)"], "temperature_c": 88}


class Played:
    """A run of two GPUs, a clock, and the alarms on it."""

    def __init__(self) -> None:
        self.now = 0.0
        state = a_run(gpu(0), gpu(1))
        state.apply(RunStatus(name="r1", state="running"))
        self.hub = PlayedHub(state)
        self.alarms = GpuAlarms(self.hub, clock=lambda: self.now)  # type: ignore[arg-type]

    def seconds(self, count: float, **changes: Any) -> list[str]:
        """What is reported in the next seconds, in which GPU 1 has `changes`."""
        self.hub.state.apply(node(gpu(0), gpu(1, **changes)))
        before = len(self.hub.events)
        for _ in range(int(count)):
            self.alarms.look()
            self.now += 1.0
        return [f"{event.severity}: {event.text}" for event in self.hub.events[before:]]


def test_healthy_gpus_are_silent() -> None:
    assert Played().seconds(100) == []


def test_an_error_is_reported_at_once_and_only_once() -> None:
    run = Played()
    (text,) = run.seconds(1, ecc_uncorrected=1)
    assert text.startswith("error: GPU 1 (rank 1): 1 ECC error of its memory could not be corrected")
    assert run.seconds(60, ecc_uncorrected=5) == []
    assert run.hub.events[0].what == "gpu" and run.hub.events[0].data == {"gpu_rank": 1, "concern": "ECC errors"}


def test_an_xid_has_an_event_of_its_own() -> None:
    assert Played().seconds(60, xid=79, xid_text="XID 79") == []


def test_a_warning_must_last_and_its_end_must_last_too() -> None:
    run = Played()
    assert run.seconds(BEGINS_S, **HOT) == []
    (text,) = run.seconds(1, **HOT)
    assert text.startswith("warning: GPU 1 (rank 1): throttled") and "88 °C" in text
    assert run.seconds(ENDS_S - 1) == []
    assert run.seconds(3) == ["info: GPU 1 (rank 1): no longer hot"]


def test_a_gpu_that_throttles_on_and_off_is_reported_once_or_not_at_all() -> None:
    run = Played()
    for _ in range(20):
        assert run.seconds(BEGINS_S - 1, **HOT) == []
        assert run.seconds(1) == []
    assert len(run.seconds(BEGINS_S + 2, **HOT)) == 1
    for _ in range(20):
        assert run.seconds(5) == []
        assert run.seconds(2, **HOT) == []


def test_a_second_fault_of_the_same_gpu_is_an_event_of_its_own() -> None:
    run = Played()
    run.seconds(BEGINS_S + 1, **HOT)
    (text,) = run.seconds(BEGINS_S + 1, **HOT, pcie_width=8)
    assert "8 of 16 lanes" in text
