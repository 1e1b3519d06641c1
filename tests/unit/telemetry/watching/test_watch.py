"""watch() outside a run, its refusals, and torch's Flight Recorder as the position in the heartbeat."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from runtime.telemetry import WatchError, watch
from runtime.telemetry.watching.collectives import SHARE, STANDS_S, FlightPosition, StepCollectives
from runtime.telemetry.watching.scalars import LateNumber
from runtime.wire.rundir import RUN_VARIABLE


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, runtime.telemetry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_outside_a_run_it_does_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = watch(model, optimizer)
    again = watch(model, optimizer)  # no run, no harm
    assert not watcher.active and not again.active
    assert not model._forward_hooks and not optimizer._optimizer_step_post_hooks
    watcher.log(loss=1.0)
    assert not watcher.should_stop
    with watcher.phase("eval"):
        pass
    watcher.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((nn.Linear(1, 1),), "needs its optimizer"),
        (("model", torch.optim.SGD([torch.zeros(1)], lr=1.0)), "expected a torch module, got str"),
        ((nn.Linear(1, 1), "adam"), "expected a torch optimizer, got str"),
    ],
)
def test_what_cannot_be_watched_is_named(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(WatchError, match=text):
        watch(*arguments)


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(TypeError, match="not 'accuracy'"):
        watch().log(accuracy=1.0)


def test_late_numbers() -> None:
    assert LateNumber(None).read() is None
    assert LateNumber(2).read() == 2.0
    assert LateNumber(torch.tensor([0.5], requires_grad=True)).read() == 0.5
    assert math.isnan(LateNumber(float("nan")).read() or 0.0)


class Recorder:
    """Torch's private functions, played."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.status = {"0": {"last_enqueued_collective": -1, "last_completed_collective": -1}}
        self.with_entries = 0
        self.entries: list[dict[str, Any]] = []
        self.slow_s = 0.0
        module = ModuleType("torch._C._distributed_c10d")
        module._dump_fr_trace = self.dump  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", module)

    def dump(self, entries: bool, _stacks: bool, _active: bool) -> bytes:
        self.with_entries += entries
        time.sleep(self.slow_s)
        entry = {"profiling_name": "gloo:all_reduce", "input_sizes": [[2, 3]], "input_dtypes": ["Float"]}
        return pickle.dumps({"pg_status": self.status, "entries": (self.entries or [entry]) if entries else []})


def test_the_position_is_the_sum_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, clock = Recorder(monkeypatch), [0.0]
    position = FlightPosition(lambda: clock[0])
    assert position() == (0, 0, "", 0)
    recorder.status = {
        "0": {"last_enqueued_collective": 7, "last_completed_collective": 7},
        "1": {"last_enqueued_collective": 3, "last_completed_collective": 2},
    }
    assert position() == (10, 9, "", 0)
    clock[0] += STANDS_S / 2
    assert position() == (10, 9, "", 0) and recorder.with_entries == 0
    clock[0] += STANDS_S / 2
    assert position() == (10, 9, "all_reduce", 24)
    assert position() == (10, 9, "all_reduce", 24) and recorder.with_entries == 1  # read once


def test_a_step_has_the_collectives_that_were_issued_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only steps that the recorder still has in full are shown, and it is not read again at once."""
    recorder = Recorder(monkeypatch)
    steps = StepCollectives(rank=1, start_step=3)

    def entry(number: int, size: int = 4, duration_ms: float | None = None) -> dict[str, Any]:
        time.sleep(0.002)
        return {
            "record_id": number,
            "profiling_name": "nccl:all_reduce",
            "input_sizes": [[size]],
            "input_dtypes": ["BFloat16"],
            "time_created_ns": time.time_ns(),
            "duration_ms": duration_ms,
        }

    recorder.entries = [entry(7)]  # the first seven were overwritten
    for _ in range(2):
        recorder.entries += [entry(8, duration_ms=2.0), entry(9, duration_ms=4.0), entry(10, size=9)]
        time.sleep(0.002)
        steps.step_ended(4 + _)
    recorder.entries.append(entry(20))  # in step 6, which goes on
    found = steps.take()
    assert [(one.rank, one.step, one.records) for one in found] == [(1, 5, [])]
    assert found[0].counted == [("all_reduce", 8, 2, 3.0), ("all_reduce", 18, 1, None)]
    assert steps.take() == [] and recorder.with_entries == 1  # no step has ended since
    steps.step_ended(6)
    assert steps.take() == [] and recorder.with_entries == 1  # too soon for its cost
    assert [one.step for one in steps.take(final=True)] == [6] and recorder.with_entries == 2


def test_steps_like_the_last_one_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    steps = StepCollectives(rank=0, start_step=0)

    def step(number: int, collectives: int) -> None:
        for _ in range(collectives):
            time.sleep(0.001)
            entry = {"record_id": len(recorder.entries), "profiling_name": "gloo:all_reduce"}
            recorder.entries.append({**entry, "time_created_ns": time.time_ns()})
        recorder.status = {"0": {"last_enqueued_collective": len(recorder.entries), "last_completed_collective": 0}}
        steps.step_ended(number)

    step(1, 3)
    assert [one.counted for one in steps.take()] == [[("all_reduce", 0, 3, None)]]
    step(2, 3)
    step(3, 3)
    assert steps.take(final=True) == [] and recorder.with_entries == 1
    step(4, 3)
    step(5, 2)
    assert [(one.step, one.counted[0][2]) for one in steps.take(final=True)] == [(4, 3), (5, 2)]
    assert recorder.with_entries == 2


def test_reading_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    recorder.slow_s = 0.02
    steps = StepCollectives(rank=0, start_step=0)
    began, step = time.monotonic(), 0
    while time.monotonic() - began < 0.5:
        steps.step_ended(step := step + 1)
        steps.take()
    assert recorder.with_entries == 1 and recorder.slow_s / SHARE >= 5  # the next time in ten seconds


def test_without_a_flight_recorder_there_is_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", ModuleType("torch._C._distributed_c10d"))
    assert FlightPosition()() is None
