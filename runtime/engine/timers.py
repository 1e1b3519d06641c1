"""DeepSpeed's timers, by which scripts measure themselves: `deepspeed.utils.timer`, and `engine.tput_timer`.

The engine's own times are in the run's telemetry, and need none of these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.distributed as dist

log = logging.getLogger("runtime.script")

_TRIMMED = 0.1
"""Share of the shortest and of the longest intervals that a mean leaves out."""


def _now(wait: bool = True) -> float:
    """Seconds of a monotonic clock. wait: for what the GPU has been given to do."""
    if wait and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timer:
    """Adds up the intervals between start() and stop()."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._began: float | None = None
        self._intervals_ms: list[float] = []

    def start(self) -> None:
        """Begin an interval. Raises RuntimeError if one has begun."""
        if self._began is not None:
            raise RuntimeError(f"timer {self.name!r}: start() was called twice without stop()")
        self._began = _now()

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End the interval. Raises RuntimeError if none has begun. reset, record: ignored, as in DeepSpeed."""
        if self._began is None:
            raise RuntimeError(f"timer {self.name!r}: stop() was called without start()")
        self._intervals_ms.append((_now() - self._began) * 1000)
        self._began = None

    def reset(self) -> None:
        """Forget all intervals."""
        self._began, self._intervals_ms = None, []

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds of all intervals, the one under way included, which goes on."""
        running = self._began is not None
        if running:
            self.stop()
        total_ms = sum(self._intervals_ms)
        if reset:
            self.reset()
        if running:
            self.start()
        return total_ms

    def mean(self) -> float:
        """Mean milliseconds of an interval, without the shortest and longest tenth."""
        ordered = sorted(self._intervals_ms)
        cut = round(len(ordered) * _TRIMMED)
        return fmean(ordered[cut : len(ordered) - cut]) if ordered else 0.0


class SynchronizedWallClockTimer:
    """Timers by name, made on first use: timers("forward").start(). On a GPU each start and stop waits for it."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self.timers.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        """All timers by name."""
        return self.timers

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Log the times of `names`, divided by `normalizer`, on `ranks` (default: rank 0; [-1]: all).
        memory_breakdown: ignored; the screen shows memory."""
        parts = [f"{n}: {self.timers[n].elapsed(reset) / normalizer:.2f}" for n in names if n in self.timers]
        rank, chosen = dist.get_rank() if dist.is_initialized() else 0, list(ranks or [0])
        if rank in chosen or -1 in chosen:
            log.info(" | ".join([f"[Rank {rank}] time (ms)", *parts]))

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean milliseconds of an interval by name, divided by `normalizer`."""
        means = {name: self.timers[name].mean() / normalizer for name in names if name in self.timers}
        for name in means if reset else ():
            self.timers[name].reset()
        return means


@dataclass(frozen=True)
class TimerSettings:
    """Of a ThroughputTimer: whether it measures, and whether it waits for the GPU before it reads the clock."""

    enabled: bool = True
    synchronized: bool = True


class ThroughputTimer:
    """Samples per second between start() and stop(global_step=True), from step `start_step` on."""

    def __init__(
        self,
        config: TimerSettings,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ) -> None:
        """config: TimerSettings, or DeepSpeed's object with these attributes. batch_size: samples per step of all
        ranks. steps_per_output: logs the figures by `logging_fn` after so many. monitor_memory: ignored."""
        self.config, self.batch_size = config, batch_size or 1
        self.start_step, self.steps_per_output = start_step, steps_per_output
        self.logging = logging_fn or log.info
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = 0.0
        self._began: float | None = None

    def update_epoch_count(self) -> None:
        """Begin the next epoch."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """Begin a micro-step."""
        if self.config.enabled:
            self._began = _now(self.config.synchronized)

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro-step; global_step: and with it an optimizer step. Without start() it does nothing."""
        if self._began is None:
            return
        seconds, self._began = _now(self.config.synchronized) - self._began, None
        self.micro_step_count += 1
        if self.global_step_count >= self.start_step:
            self.total_elapsed_time += seconds
        if not global_step:
            return
        self.global_step_count += 1
        if report_speed and self.steps_per_output and not self.global_step_count % self.steps_per_output:
            self.logging(
                f"epoch {self.epoch_count}, micro-step {self.micro_step_count}, step {self.global_step_count}: "
                f"{self.avg_samples_per_sec():.3g} samples/s in the mean"
            )

    def avg_samples_per_sec(self) -> float:
        """Samples per second over all measured steps; -inf before the first one."""
        steps = self.global_step_count - self.start_step
        return self.batch_size * steps / self.total_elapsed_time if steps > 0 else float("-inf")
