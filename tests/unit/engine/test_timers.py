"""DeepSpeed's timers and monitor, on a clock that the tests move."""

from __future__ import annotations

import logging

import pytest
import torch

from runtime.engine import timers
from runtime.engine.monitor import ScriptMonitor
from runtime.engine.timers import SynchronizedWallClockTimer, ThroughputTimer, TimerSettings


class Clock:
    seconds = 0.0

    def __call__(self, wait: bool = True) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timers, "_now", made)
    return made


def test_intervals_add_up_and_one_under_way_counts(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    made = SynchronizedWallClockTimer()
    timer = made("forward")
    assert made("forward") is timer and made.get_timers() == {"forward": timer}
    for seconds in (1, 3):
        timer.start()
        clock.seconds += seconds
        timer.stop()
    assert timer.mean() == 2000 and timer.elapsed(reset=False) == 4000
    timer.start()
    clock.seconds += 0.5
    assert timer.elapsed() == 4500
    clock.seconds += 0.25
    timer.stop()
    with caplog.at_level(logging.INFO, "runtime.script"):
        made.log(["forward", "unknown"], normalizer=2)
        made.log(["forward"], ranks=[1])
    assert caplog.messages == ["[Rank 0] time (ms) | forward: 125.00"] and timer.elapsed() == 0
    assert made.get_mean(["forward", "unknown"]) == {"forward": 0}
    with pytest.raises(RuntimeError, match="'forward': stop"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="'forward': start"):
        timer.start()


def test_a_mean_leaves_out_the_shortest_and_the_longest_tenth(clock: Clock) -> None:
    timer = SynchronizedWallClockTimer()("step")
    for seconds in (1000, *[2] * 8, 0):
        timer.start()
        clock.seconds += seconds
        timer.stop()
    assert timer.mean() == 2000


def test_samples_per_second_count_from_the_start_step_on(clock: Clock) -> None:
    said: list[str] = []
    timer = ThroughputTimer(TimerSettings(), 8, start_step=1, steps_per_output=2, logging_fn=said.append)
    timer.stop()
    assert timer.micro_step_count == 0 and timer.avg_samples_per_sec() == float("-inf")
    for seconds in (100, 1, 3):
        for _ in range(2):
            timer.start()
            clock.seconds += seconds / 2
            timer.stop(global_step=_ == 1)
    assert timer.global_step_count == 3 and timer.avg_samples_per_sec() == 4.0
    assert said == ["epoch 0, micro-step 4, step 2: 8 samples/s in the mean"]
    timer.update_epoch_count()
    assert (timer.epoch_count, timer.micro_step_count) == (1, 0)
    off = ThroughputTimer(TimerSettings(enabled=False), 8)
    off.start()
    off.stop(global_step=True)
    assert off.global_step_count == 0


def test_a_scripts_figures_are_lines_of_rank_0s_log(caplog: pytest.LogCaptureFixture) -> None:
    events = [("valid/loss", torch.tensor([2.5]), 40), ("valid/accuracy", 1, 40), ("lr", 0.0003, 41)]
    with caplog.at_level(logging.INFO, "runtime.script"):
        ScriptMonitor(1).write_events(events)
        ScriptMonitor(0).write_events(events)
    assert ScriptMonitor.enabled
    assert caplog.messages == ["at 40: valid/loss 2.5, valid/accuracy 1", "at 41: lr 0.0003"]
