"""Phases by a real GPU's time: what the host launches in a moment lasts as long as the GPU takes for it."""

from __future__ import annotations

import time

import pytest
import torch

from runtime.telemetry.device_time import DeviceTime, StreamMarks
from runtime.telemetry.recorder import Recorder
from runtime.wire.messages import StepResult

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SLEEP_CYCLES = 200_000_000  # about a tenth of a second


def slept_ms() -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(SLEEP_CYCLES)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def test_phases_and_waits_are_those_of_the_compute_stream() -> None:
    device = torch.device("cuda", 0)
    other = torch.cuda.Stream(device)
    recorder = Recorder()
    recorder.follow_device(StreamMarks(device, DeviceTime(other)))
    expected = slept_ms()
    began = time.monotonic()
    recorder.enter("forward", 1, 1)
    torch.cuda._sleep(SLEEP_CYCLES)
    recorder.enter("backward")
    with recorder.span("reduce"):
        with torch.cuda.stream(other):
            other.wait_stream(torch.cuda.current_stream(device))
            torch.cuda._sleep(SLEEP_CYCLES)
        torch.cuda.current_stream(device).wait_stream(other)
    recorder.enter("data", 2, 0)
    launched_ms = 1e3 * (time.monotonic() - began)
    recorder.step(StepResult(rank=0, step=1, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=1.0, end_ns=0))
    torch.cuda.synchronize(device)
    (found,) = recorder.drain().steps
    assert launched_ms < expected, "the host has waited for the GPU"
    assert found.phase_ms["forward"] == pytest.approx(expected, rel=0.05)
    assert found.phase_ms["reduce"] == pytest.approx(expected, rel=0.05)
    assert found.phase_ms["backward"] < 0.1 * expected
