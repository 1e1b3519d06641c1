"""Reports every optimizer step: its result to telemetry, and a progress line to the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime.models.origin import origin_of
from runtime.state.train_state import TrainState
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import StepResult
from runtime.zero.step_stats import StepStats

log = logging.getLogger("runtime.train")


class Measured(NamedTuple):
    """What the host knows of a step by itself."""

    step: int
    seconds: float
    tokens: int
    """Of this rank's micro-batches; 0 where they can't be counted."""
    loss_scale: float
    end_ns: int
    """CLOCK_MONOTONIC."""


class Reporter:
    """Reports the optimizer steps of one engine."""

    def __init__(self, state: TrainState, telemetry: Telemetry | NullTelemetry, knobs: Mapping[str, Any]) -> None:
        """knobs: its "log_interval" is read at each step."""
        self._state, self._telemetry, self._knobs = state, telemetry, knobs
        self._began_ns = time.monotonic_ns()

    def begin_step(self) -> None:
        """Start timing the next optimizer step."""
        self._began_ns = time.monotonic_ns()

    def measure(self) -> Measured:
        """Measure the step that ends now. Call it at the boundary, after the step counter was advanced and before the
        accumulation ends."""
        now, state = time.monotonic_ns(), self._state
        return Measured(
            state.counters.global_steps,
            (now - self._began_ns) / 1e9,
            state.accumulation.tokens,
            state.scaler.scale,
            now,
        )

    def report(self, stats: StepStats, lr: float, measured: Measured) -> StepResult:
        """Report a step when its statistics are known."""
        state, config = self._state, self._state.config
        step, seconds, tokens, loss_scale, end_ns = measured
        result = StepResult(
            rank=state.comm.rank,
            step=step,
            loss=stats.loss,
            lr=lr,
            grad_norm=stats.grad_norm,
            step_ms=seconds * 1000,
            tokens_per_s=tokens / seconds if tokens else None,
            samples_per_s=config.micro_batch * config.accumulation / seconds,
            skipped=stats.skipped,
            skipped_steps=state.counters.skipped_steps,
            loss_scale=loss_scale if config.precision == "fp16" else None,
            end_ns=end_ns,
        )
        if (origin := origin_of(state.module)) is not None and stats.loss is not None:
            origin.loss = stats.loss
        self._telemetry.step(result)
        self._log(result)
        return result

    def _log(self, result: StepResult) -> None:
        """Log a progress line every log_interval steps, on rank 0."""
        if result.rank != 0 or result.step % self._knobs["log_interval"]:
            return
        total = self._state.config.zerotop.train.steps
        of = f"/{total}" if total else ""
        world = self._state.comm.world_size
        speed = f" · {result.tokens_per_s * world:,.0f} tokens/s" if result.tokens_per_s else ""
        loss = "n/a" if result.loss is None else f"{result.loss:.4f}"
        log.info(
            f"step {result.step}{of} · loss {loss} · lr {result.lr:.3g} · norm "
            f"{result.grad_norm:.3f} · {result.step_ms:.1f} ms{speed}"
        )
