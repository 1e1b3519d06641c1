"""Steps whose loss or gradient norm is not finite: what is said of them, and when they end a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.comm import Comm
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import StepResult
from runtime.zero.step_stats import StepStats

log = logging.getLogger("runtime.train")

MOST_NONFINITE_STEPS = 10
"""Steps in a row that are not finite, outside fp16, after which a run ends: it would only count steps."""


class TrainingError(RuntimeError):
    """Training can't go on, and would come to the same point again; the message says at which step, why, and what
    remains. `culprit` is the rank with whose data it began, where one can be told."""

    def __init__(self, message: str, culprit: int | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


class NonFiniteSteps:
    """Of one engine's steps. Every method is called on all ranks alike."""

    def __init__(
        self,
        comm: Comm,
        link: Telemetry | NullTelemetry,
        scales_loss: bool,
        newest_checkpoint: Callable[[], Path | None],
    ) -> None:
        """scales_loss: fp16, whose loss scale answers gradients that overflow."""
        self._comm, self._link, self._scales_loss = comm, link, scales_loss
        self._newest_checkpoint = newest_checkpoint
        self.first_ends_run = False
        """A gradient that is not finite ends the run at once: further steps would only hide where it began."""
        self.last_is_finite = True
        """Loss and gradient norm of the last step were finite. What a step that wasn't leaves (batch norm's averages)
        may be of no use, so its checkpoint takes no good one's place."""
        self._steps: list[int] = []
        """The steps since the last finite one, outside fp16."""
        self._culprits: tuple[int, ...] = ()
        """The ranks whose own loss was not finite in the newest step that wasn't."""

    def forget(self) -> None:
        """Another state has been loaded."""
        self.last_is_finite, self._steps = True, []

    @property
    def culprit(self) -> int | None:
        """The rank with whose data the newest step that was not finite began; None where no single one can be told."""
        return self._culprits[0] if len(self._culprits) == 1 else None

    def whose(self) -> str:
        """Of a step that was not finite: "; only the loss of rank 1 is not finite", where that tells something."""
        if not self._culprits or len(self._culprits) == self._comm.world_size:
            return ""
        names = ", ".join(str(rank) for rank in self._culprits)
        if len(self._culprits) == 1:
            return f"; only the loss of rank {names} is not finite"
        return f"; the losses of ranks {names} are not finite"

    def report(self, result: StepResult, own_loss: torch.Tensor | float | None) -> None:
        """An event and a log line for a step that was not finite, from the rank where it began. own_loss: this rank's,
        of which result.loss is the mean; None where it is not known."""
        if is_finite(result.grad_norm) and is_finite(result.loss):
            return
        self._culprits = self._ranks_with(own_loss)
        if result.rank != (self._culprits[0] if self._culprits else 0):
            return
        what, severity = "not finite", "error"
        if result.skipped and result.loss_scale is not None:  # part of finding the scale
            what, severity = "overflow", "warning"
            text = f"step {result.step} skipped: a gradient overflowed at loss scale {result.loss_scale:g}"
        elif result.skipped:
            text = (
                f"step {result.step} skipped: the gradient norm is {result.grad_norm} and the loss "
                f"{'n/a' if result.loss is None else result.loss}{self.whose()}"
            )
        else:
            text = (
                f"step {result.step}: the loss is {result.loss}; its gradients are finite, so the step was "
                f"taken{self.whose()}"
            )
        of_run = not self._culprits  # gradients that come from no rank's loss
        self._link.event(what, text, severity=severity, step=result.step, of_run=of_run)  # type: ignore[arg-type]
        log.log(logging.ERROR if severity == "error" else logging.WARNING, text)

    def note(self, stats: StepStats) -> None:
        """Of the last step."""
        self.last_is_finite = is_finite(stats.grad_norm) and is_finite(stats.loss)

    def count(self, step: int, stats: StepStats) -> None:
        """At a boundary. Raises TrainingError outside fp16 when the last MOST_NONFINITE_STEPS steps were not finite, or
        at the first one whose gradients are not where `first_ends_run`."""
        if self._scales_loss or (is_finite(stats.grad_norm) and is_finite(stats.loss)):
            self._steps = []
            return
        if self.first_ends_run and not is_finite(stats.grad_norm):
            raise TrainingError(
                f"the gradient norm is {stats.grad_norm} at step {step}{self.whose()}: lower optimizer.params.lr, set "
                "gradient_clipping, or look at the data; launch with --resume to continue from the newest checkpoint",
                self.culprit,
            )
        self._steps.append(step)
        if len(self._steps) < MOST_NONFINITE_STEPS:
            return
        found = self._newest_checkpoint()
        raise TrainingError(
            f"the loss or the gradient norm was not finite in {MOST_NONFINITE_STEPS} steps in a row, from step "
            f"{self._steps[0]} on: lower optimizer.params.lr, set gradient_clipping, or look at the data of that "
            f"step{self.whose()}. "
            + (f"The newest checkpoint is {found}" if found is not None else "There is no checkpoint to return to"),
            self.culprit,
        )

    def _ranks_with(self, own_loss: torch.Tensor | float | None) -> tuple[int, ...]:
        """The ranks whose own loss is not finite. Collective."""
        comm = self._comm
        flags = torch.zeros(comm.world_size, dtype=torch.float64, device=comm.device)
        flags[comm.rank] = not is_finite(own_loss)
        comm.all_reduce(flags).wait()
        return tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)


def is_finite(value: torch.Tensor | float | None) -> bool:
    """A loss that nobody knows is not held against anyone."""
    return value is None or math.isfinite(value)
