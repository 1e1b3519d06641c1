"""Reports steps whose loss or gradient norm is not finite, and ends the run after too many of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from runtime.comm import Comm
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import StepResult
from runtime.zero.step_stats import StepStats

log = logging.getLogger("runtime.train")

MOST_NONFINITE_STEPS = 10
"""Consecutive non-finite steps after which a run ends, except under fp16."""


class TrainingError(RuntimeError):
    """Training cannot continue, and a restart would fail at the same point; the message says at which step, why, and
    what to do. `culprit`: the rank whose data caused it, if known."""

    def __init__(self, message: str, culprit: int | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


class NonFiniteSteps:
    """Tracks the non-finite steps of one engine. Call every method on all ranks."""

    def __init__(
        self,
        comm: Comm,
        link: Telemetry | NullTelemetry,
        scales_loss: bool,
        newest_checkpoint: Callable[[], Path | None],
    ) -> None:
        """scales_loss: whether precision is fp16, where overflows are part of finding the loss scale.
        newest_checkpoint: finds the newest checkpoint."""
        self._comm, self._link, self._scales_loss = comm, link, scales_loss
        self._newest_checkpoint = newest_checkpoint
        self.first_ends_run = False
        """A gradient that is not finite ends the run at once: further steps would only hide where it began."""
        self.last_is_finite = True
        """Whether loss and gradient norm of the last step were finite. If not, the state may be useless (batch norm's
        averages), so its checkpoint must not replace a good one."""
        self._steps: list[int] = []
        """The steps since the last finite one, outside fp16."""
        self._culprits: tuple[int, ...] = ()
        """Ranks whose own loss was not finite in the latest non-finite step."""

    def forget(self) -> None:
        """Reset, after another training state has been loaded."""
        self.last_is_finite, self._steps = True, []

    @property
    def culprit(self) -> int | None:
        """The only rank whose loss was not finite in the latest non-finite step; None if it was not exactly one."""
        return self._culprits[0] if len(self._culprits) == 1 else None

    def describe_culprits(self) -> str:
        """For messages: "; only the loss of rank 1 is not finite", or empty if that applies to all ranks or none."""
        if not self._culprits or len(self._culprits) == self._comm.world_size:
            return ""
        names = ", ".join(str(rank) for rank in self._culprits)
        if len(self._culprits) == 1:
            return f"; only the loss of rank {names} is not finite"
        return f"; the losses of ranks {names} are not finite"

    def report(self, result: StepResult, own_loss: float | None) -> None:
        """Report a non-finite step as event and log line, from the first culprit, else from rank 0. own_loss: this
        rank's loss, of which result.loss is the mean; None if unknown."""
        if is_finite(result.grad_norm) and is_finite(result.loss):
            return
        self._culprits = self._ranks_with(own_loss)
        if result.rank != (self._culprits[0] if self._culprits else 0):
            return
        what, severity = "not finite", "error"
        if result.skipped and result.loss_scale is not None:  # part of finding the loss scale
            what, severity = "overflow", "warning"
            text = f"step {result.step} skipped: a gradient overflowed at loss scale {result.loss_scale:g}"
        elif result.skipped:
            text = (
                f"step {result.step} skipped: the gradient norm is {result.grad_norm} and the loss "
                f"{'n/a' if result.loss is None else result.loss}{self.describe_culprits()}"
            )
        else:
            text = (
                f"step {result.step}: the loss is {result.loss}; its gradients are finite, so the step was "
                f"applied{self.describe_culprits()}"
            )
        of_run = not self._culprits  # the gradients overflowed, not a rank's loss
        self._link.event(what, text, severity=severity, step=result.step, of_run=of_run)  # type: ignore[arg-type]
        log.log(logging.ERROR if severity == "error" else logging.WARNING, text)

    def note(self, stats: StepStats) -> None:
        """Note whether the last step was finite."""
        self.last_is_finite = is_finite(stats.grad_norm) and is_finite(stats.loss)

    def count(self, step: int, stats: StepStats) -> None:
        """Count a step at a boundary. Except under fp16, raises TrainingError if the last MOST_NONFINITE_STEPS steps
        were not finite, or with `first_ends_run` if the gradients of this one are not."""
        if self._scales_loss or (is_finite(stats.grad_norm) and is_finite(stats.loss)):
            self._steps = []
            return
        if self.first_ends_run and not is_finite(stats.grad_norm):
            raise TrainingError(
                f"the gradient norm is {stats.grad_norm} at step {step}{self.describe_culprits()}: lower "
                "optimizer.params.lr, set gradient_clipping, or look at the data; launch with --resume to continue "
                "from the newest checkpoint",
                self.culprit,
            )
        self._steps.append(step)
        if len(self._steps) < MOST_NONFINITE_STEPS:
            return
        found = self._newest_checkpoint()
        raise TrainingError(
            f"the loss or the gradient norm was not finite in {MOST_NONFINITE_STEPS} steps in a row, from step "
            f"{self._steps[0]} on: lower optimizer.params.lr, set gradient_clipping, or look at the data of that "
            f"step{self.describe_culprits()}. "
            + (f"The newest checkpoint is {found}" if found is not None else "There is no checkpoint to resume from"),
            self.culprit,
        )

    def _ranks_with(self, own_loss: float | None) -> tuple[int, ...]:
        """The ranks whose own loss is not finite. Collective, but nothing of it waits for a device."""
        flags = self._comm.gather_objects(not is_finite(own_loss))
        return tuple(rank for rank, flag in enumerate(flags) if flag)


def is_finite(value: float | None) -> bool:
    """Whether `value` is finite; an unknown one (None) counts as finite."""
    return value is None or math.isfinite(value)
