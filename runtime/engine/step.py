"""The optimizer step at a boundary: agree (norm, loss, commands) -> clip -> update each unit and all-gather it ->
report -> commands.

[Note: a step that the host does not wait for]
On a GPU the norm, the clip factor and whether a gradient overflowed stay on the device: the update kernel reads factor
and skip flag there, and the training thread goes on. Where gradients are accumulated in host memory (offload at stages
2 and 3), another thread waits for their downloads and all-reduces the same numbers on the host. Either way they are a
StepDecision, for which the updates of offloaded states wait on their thread. What the training thread has to know of
step N it reads at the boundary of step N + 1 (or when somebody asks), from a copy that has long arrived then:

boundary N    all-reduce N -> update N (assumed to be taken: counters, schedule)     copy of the statistics of N begins
boundary N+1  settle N: result, loss scale, undo if it was skipped -> all-reduce N+1 -> update N+1 -> commands of N

So the ranks obey commands one step later than they hear of them, all at the same one. A step is settled at once on
CPUs, with other optimizers than AdamW, and where offloaded updates must be complete when step() returns.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from runtime import native
from runtime.engine.activation_samples import ActivationSamples
from runtime.engine.control import Control
from runtime.engine.nonfinite import NonFiniteSteps, TrainingError
from runtime.engine.report import Measured, Reporter
from runtime.optim.shard_optimizer import ShardAdamW
from runtime.state.loss_scale import ScaleExhausted
from runtime.state.train_state import TrainState
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.messages import StepResult
from runtime.zero import step_stats
from runtime.zero.step_decision import StepDecision
from runtime.zero.step_stats import PendingStats, StepStats, clip_coefficient, sync_step_stats


class _Unsettled(NamedTuple):
    """A step whose statistics are still on their way."""

    stats: PendingStats
    lr: float
    measured: Measured
    schedule_before: tuple[dict[str, Any], list[dict[str, Any]]] | None
    """State of the learning-rate scheduler and the parameter groups before it advanced."""


class _Settled(NamedTuple):
    """A step of which the ranks have not been told yet: that takes all of them."""

    stats: StepStats
    result: StepResult


class OptimizerSteps:
    """Takes the optimizer steps of one engine."""

    def __init__(
        self,
        state: TrainState,
        telemetry: Telemetry | NullTelemetry,
        control: Control,
        nonfinite: NonFiniteSteps,
        reporter: Reporter,
        samples: ActivationSamples,
    ) -> None:
        self._state, self._telemetry, self._control = state, telemetry, control
        self._nonfinite, self._reporter, self._samples = nonfinite, reporter, samples
        self._unsettled: _Unsettled | None = None
        self._settled: _Settled | None = None
        self._last: StepStats | None = None
        state.settle_step = self.settle

    @property
    def last(self) -> StepStats | None:
        """Of the last step, None before the first. Waits for them."""
        self.settle()
        return self._last

    def take(self, lr_kwargs: Mapping[str, Any]) -> None:
        """One step with the gradients that have been accumulated; every rank calls it. lr_kwargs: keyword arguments for
        the scheduler's step()."""
        state, accumulation = self._state, self._state.accumulation
        self.settle()
        commands = self._tell()
        state.optimizer.check_groups()
        state.changes.check()
        self._telemetry.enter("step", state.counters.global_steps + 1, state.config.accumulation)
        ahead = self._can_run_ahead()
        downloads = state.gradient_downloads if ahead else None
        if downloads is None:
            state.settle_gradients()
        divisor, loss, changed = state.gradient_divisor, accumulation.loss, state.changes.detected()
        stats = sync_step_stats(
            state.flats,
            state.comm,
            loss,
            divisor,
            command_waits=self._control.command_waits(state.counters.global_steps + (2 if ahead else 1)),
            stop_asked=self._control.stop_asked(),
            execution_hash=state.unsharder.take_execution_hash(),
            changed=changed,
            downloads=downloads,
        )
        groups = state.optimizer.hyperparameters(state.counters.lr_factor)
        if ahead:
            decision = stats.decision(state.config.gradient_clipping)
            if decision.scale is not None and changed is True:
                state.changes.commit()
            state.update(groups, decision)
            before = self._schedule()
            self._finish(taken=True, lr_kwargs=lr_kwargs)
            self._unsettled = _Unsettled(stats, groups[0]["lr"], self._reporter.measure(), before)
        else:
            known = stats.read()
            if known.changed:
                state.changes.commit()
            if not known.skipped:
                factor = clip_coefficient(known.grad_norm, state.config.gradient_clipping) / divisor
                state.update(groups, StepDecision.known(factor))
            self._last = known
            self._finish(taken=not known.skipped, lr_kwargs=lr_kwargs)
            result = self._reporter.report(known, groups[0]["lr"], self._reporter.measure())
            self._settled = _Settled(known, result)
            self._rescale(known.skipped)
            commands = self._tell()
        accumulation.end_step()
        self._control.at_boundary(commands)
        self._samples.at_boundary()
        self._telemetry.enter("data", state.counters.global_steps + 1, 0)
        self._reporter.begin_step()

    def settle(self) -> None:
        """Returns when the host knows all of the last step. See [Note: a step that the host does not wait for]. No
        collective: one rank alone may want to know."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is None:
            return
        state, stats = self._state, unsettled.stats.read()
        self._last = stats
        if stats.skipped:
            state.counters.optimizer_steps -= 1
            self._undo_schedule(unsettled.schedule_before)
        if stats.changed:
            state.changes.log_commit()
        result = self._reporter.report(stats, unsettled.lr, unsettled.measured)
        self._settled = _Settled(stats, result)
        self._nonfinite.note(stats)
        self._rescale(stats.skipped)

    def finish(self) -> None:
        """The training is over: every rank calls it."""
        self.settle()
        self._tell()

    def _tell(self) -> StepStats | None:
        """What takes all ranks at the end of a step: who had a loss that is not finite, and whether that ends the run.
        Returns the step's statistics, once."""
        settled, self._settled = self._settled, None
        if settled is None:
            return None
        self._nonfinite.note(settled.stats)
        self._nonfinite.report(settled.result, settled.stats.own_loss)
        self._nonfinite.count(settled.result.step, settled.stats)
        return settled.stats

    def _finish(self, taken: bool, lr_kwargs: Mapping[str, Any]) -> None:
        state = self._state
        state.reducer.clear()
        state.counters.global_steps += 1
        if state.lr_scheduler is not None and taken:
            state.optimizer.mark_stepped()
            state.lr_scheduler.step(**lr_kwargs)

    def _rescale(self, overflow: bool) -> None:
        """fp16: the next loss scale. Raises TrainingError when it can't be lowered any more."""
        try:
            self._state.scaler.update(overflow)
        except ScaleExhausted as error:
            raise TrainingError(f"step {self._state.counters.global_steps}: {error}") from None

    # ---- running ahead of the device -------------------------------------------------------------------------------
    def _can_run_ahead(self) -> bool:
        """Whether there is a device to run ahead of, and updates need nothing from the training thread: AdamW by our
        kernels, with states on the device, or updated beside the next forward."""
        state, scheduler = self._state, self._state.lr_scheduler
        kernels = state.device.type != "cuda" or native.cuda_available()
        offloads = any(flat.placement.offloaded for flat in state.flats)
        return (
            step_stats.arrive_late(state.device)
            and kernels
            and all(isinstance(one, ShardAdamW) for one in state.shard_optimizers)
            and (not offloads or (state.updates.will_overlap and native.available()))
            and (scheduler is None or (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")))
        )

    def _schedule(self) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What `_undo_schedule` needs; None without a scheduler."""
        if self._state.lr_scheduler is None:
            return None
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        return copy.deepcopy(self._state.lr_scheduler.state_dict()), copy.deepcopy(groups)

    def _undo_schedule(self, before: tuple[dict[str, Any], list[dict[str, Any]]] | None) -> None:
        """The step was skipped: neither the scheduler nor what it does to the groups has happened."""
        if before is None:
            return
        scheduler, groups = before
        self._state.lr_scheduler.load_state_dict(scheduler)
        for group, values in zip(self._groups, groups, strict=True):
            group.update(values)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._state.optimizer.param_groups
