"""When each unit is updated. Without offload: all of them, in forward order, inside engine.step(). With it:

thread    | update embedding | update 0 | update 1 | update 2 | ...
training  | step() |    wait | forward embedding | wait, gather 0 | forward 0 | gather 1 | forward 1 | ...

The forward waits only for the unit it needs next, so most of the update hides behind it. New parameters are
all-gathered in the order of updates, the same on every rank whatever its model runs first, and all of them before
backward begins.

On a GPU the ranks may still be deciding about the step (StepDecision) when step() returns: the thread waits for that.
If only the host will know the decision, the training thread updates a unit whose states stay on the device when it
waits for the unit.

[Note: parameters used outside their unit's forward]
A pre-forward hook of each unit waits for its update. A model that reads a parameter outside that forward (a weight that
is passed to a function, an average of other weights) would read it too early. So inside the model's forward, parameters
are LateParameters (zero/parameter.py) until their unit runs: computing with one waits for it. Compiled extensions don't
look at a parameter's class. So the first steps don't overlap, and find the units whose parameters receive gradients
although nobody has waited for them: the model's forward waits for these when it begins. If a unit does so later for the
first time, that is an error instead of a wrong result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from runtime.comm import Done, Pending
from runtime.comm.profiling import profiler_range
from runtime.comm.transfer import Copy
from runtime.optim.shard_optimizer import Hyper, OptimizerStep, ShardOptimizer
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.flat import FlatParamGroup
from runtime.zero.hooks import EngineHook
from runtime.zero.parameter import mark_late, mark_on_time
from runtime.zero.step_decision import StepDecision
from runtime.zero.unit import Unit
from runtime.zero.unshard import owners

LEARNING_STEPS = 2
"""Number of first updates without overlap: see the note."""


class Updates:
    """Runs the optimizers of one engine's shards, in forward order."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        shard_optimizers: Sequence[ShardOptimizer],
        telemetry: Telemetry | NullTelemetry,
        executor: Executor | None = None,
        mark: Callable[[], Any] = lambda: None,
        overlap: bool = True,
        on_idle: Callable[[Updates], None] = lambda updates: None,
        before: Callable[[FlatParamGroup], None] = lambda flat: None,
    ) -> None:
        """executor: one thread that updates shards whose states are offloaded; None: none are. mark: records the
        compute stream's current position, after which copies may begin (Transfers.mark). overlap: whether offloaded
        updates overlap with the next forward. on_idle: called when no update is under way any more. before: waits until
        a shard may change, because a checkpoint may still be reading it."""
        self._before_update = before
        self.shard_optimizers = list(shard_optimizers)
        self._positions = {id(optimizer.flat): position for position, optimizer in enumerate(self.shard_optimizers)}
        self.telemetry, self.executor, self._mark = telemetry, executor, mark
        self.overlap, self.on_idle = overlap and executor is not None, on_idle
        self._stream: Any = None
        """Compute stream of the training thread on a GPU, which uses the parameters whichever thread waits for them."""
        self.units = [unit for unit in units if unit.flats]
        self._jobs: list[Future[Copy | None] | None] = []
        """For each shard, its update on the executor; None: the training thread updates it."""
        self._copies: list[Copy | None] = []
        """For each shard that the training thread has updated, the copy of its new parameters to the device."""
        self._step: OptimizerStep | None = None
        """The step under way: kernels on other streams read its tensors until the last wait."""
        self._undecided: set[int] = set()
        """Shards that the training thread updates when it waits for them."""
        self._unfenced: list[Pending] = []
        """All-gathers for which other ranks may still be reading this rank's memory."""
        self._writes: list[int] = []
        """For each group, its in_place_writes() when its update began."""
        self._finished = 0  # number of shards that are updated and all-gathered
        self._ends: dict[int, int] = {}  # id of a unit -> its groups are finished when _finished is this
        end = 0
        for unit in self.units:
            end += len(unit.flats)
            self._ends[id(unit)] = end
        self._launched = 0
        self._wait_before_model: set[int] = set()
        """ids of units for which the model's forward waits when it begins."""
        self._ran_units: set[int] = set()
        """ids of units of which a module has run since the last update."""
        self._hooks: list[Any] = []
        if self.overlap:
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        compiled = hasattr(module, "_orig_mod")  # as one graph, which hooks inside would break
        for unit in self.units:
            before_model = unit.keep_unsharded or compiled
            self._wait_before_model |= {id(unit)} if before_model else set()
            for member in {module, *owners(module, unit.flats)} if before_model else unit.modules:
                before = EngineHook(self, Updates._before_forward, unit)
                self._hooks.append(member.register_forward_pre_hook(before, prepend=True))
        self._hooks += [
            module.register_forward_pre_hook(EngineHook(self, Updates._before_model), prepend=True),
            module.register_forward_hook(EngineHook(self, Updates._after_model), always_call=True),
        ]

    def wait_for_shard(self, flat: FlatParamGroup) -> None:
        """Wait until this rank's shard of `flat` has the last step's parameters. On a GPU the current stream waits, not
        the host."""
        position = self._positions.get(id(flat))
        if position is not None and position < len(self._jobs):
            with self._on_training_stream():
                self._wait_for_update(position)

    def detach(self) -> None:
        """Finish the update and remove the hooks: the engine gives the model up."""
        try:
            self.drain()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    # ---- the step --------------------------------------------------------------------------------------------------
    @property
    def will_overlap(self) -> bool:
        """Whether the next launch() leaves the updates of offloaded states running."""
        return self.overlap and self._launched >= LEARNING_STEPS

    def launch(self, groups: Sequence[Hyper], step: int, decision: StepDecision) -> None:
        """Begin optimizer step `step`, if `decision` takes it. `wait_for_unit` and `drain` finish it."""
        self.drain()
        device = self.shard_optimizers[0].flat.comm.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        optimizer_step = self._step = OptimizerStep(groups, step, decision, self._mark())
        self._ran_units.clear()
        self._finished = 0
        self._writes = [optimizer.flat.in_place_writes() for optimizer in self.shard_optimizers]
        self._copies = [None] * len(self.shard_optimizers)
        self._jobs = [self._submit(optimizer, optimizer_step) for optimizer in self.shard_optimizers]
        overlap = self.will_overlap
        self._launched += 1
        if not overlap:
            self._finish_without_overlap(optimizer_step)
            return
        own = [position for position, job in enumerate(self._jobs) if job is None]
        if decision.scale is None and not decision.is_known:
            self._undecided = set(own)
            return
        for position in own:
            self._copies[position] = self._update(self.shard_optimizers[position], optimizer_step)

    def _submit(self, optimizer: ShardOptimizer, optimizer_step: OptimizerStep) -> Future[Copy | None] | None:
        """Submit the update to the executor; None: the training thread has to do it."""
        if self.executor is None or not optimizer.flat.placement.offloaded:
            return None
        return self.executor.submit(self._update, optimizer, optimizer_step)

    def _update(self, optimizer: ShardOptimizer, optimizer_step: OptimizerStep) -> Copy | None:
        self._before_update(optimizer.flat)
        with profiler_range("update", optimizer.flat.policy.stage, optimizer.flat.name):
            return optimizer.update(optimizer_step)

    def _finish_without_overlap(self, optimizer_step: OptimizerStep) -> None:
        """Update all units in forward order, each while the one before it is all-gathered."""
        all_gathers = []
        for position, optimizer in enumerate(self.shard_optimizers):
            if self._jobs[position] is None:
                self._copies[position] = self._update(optimizer, optimizer_step)
            self._wait_for_update(position)
            all_gathers.append(self._all_gather(optimizer.flat))
        with self.telemetry.span("gather"):
            for all_gather in all_gathers:
                all_gather.wait()
        self._unfenced = all_gathers
        self._idle()

    def _all_gather(self, flat: FlatParamGroup) -> Pending:
        flat.record_fingerprint()
        return Done() if flat.sharded else flat.all_gather_updated()

    @property
    def under_way(self) -> bool:
        """Whether an update has begun and not finished."""
        return self._finished < len(self._jobs)

    # ---- waiting ---------------------------------------------------------------------------------------------------
    def wait_for_unit(self, unit: Unit) -> None:
        """Wait until the parameters of `unit`, and of all units before it, are those of the last step."""
        if self.under_way:
            self._finish(self._ends[id(unit)])

    def drain(self) -> None:
        """Wait until the last step is finished. Raises the exceptions of its updates."""
        if self.under_way:
            self._finish(len(self._jobs))
        self._idle()

    def _idle(self) -> None:
        """End the update: wait until no other rank reads this rank's parameters, because the script may write them."""
        for all_gather in self._unfenced:
            all_gather.fence()
        self._unfenced = []
        self._jobs, self._copies, self._step = [], [], None
        self._undecided.clear()
        self._finished = 0
        self.on_idle(self)

    def _finish(self, end: int) -> None:
        with self._on_training_stream():
            while self._finished < end:
                self._wait_for_update(self._finished)
                flat = self.shard_optimizers[self._finished].flat
                if flat.in_place_writes() != self._writes[self._finished]:
                    raise RuntimeError(
                        f"parameters of {flat.name} were changed in place while their offloaded update was still "
                        "running, which would overwrite the change: call engine.synchronize() before it"
                    )
                all_gather = self._all_gather(flat)
                with self.telemetry.span("gather"):
                    all_gather.wait()
                self._unfenced.append(all_gather)
                self._finished += 1

    @contextmanager
    def _on_training_stream(self) -> Iterator[None]:
        """On a GPU, make waits inside those of the training thread's stream, and the current stream wait for that."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            yield
        if current != self._stream:
            current.wait_stream(self._stream)

    def _wait_for_update(self, position: int) -> None:
        job = self._jobs[position]
        if position in self._undecided:
            assert self._step is not None
            self._undecided.discard(position)
            with self.telemetry.span("offload"):
                self._copies[position] = self._update(self.shard_optimizers[position], self._step)
        copy = self._copies[position]
        if job is not None and not job.done():
            with self.telemetry.span("offload"):
                copy = job.result()
        elif job is not None:
            copy = job.result()
        if copy is not None:
            copy.wait_device()

    # ---- hooks -----------------------------------------------------------------------------------------------------
    def _before_model(self, *_given: Any) -> None:
        for unit in self.units:
            if id(unit) in self._wait_before_model:
                self.wait_for_unit(unit)

        for unit in self.units:
            if id(unit) not in self._ran_units | self._wait_before_model:
                mark_late(_whole_parameters(unit), functools.partial(self._before_forward, unit))

    def _after_model(self, *_given: Any) -> None:
        """Between two forwards perhaps only one rank reads, but waiting takes all of them: engine.synchronize()."""
        for unit in self.units:
            mark_on_time(_whole_parameters(unit))

    def _before_forward(self, unit: Unit, *_given: Any) -> None:
        self._ran_units.add(id(unit))
        self.wait_for_unit(unit)
        mark_on_time(_whole_parameters(unit))

    def check(self) -> None:
        """After a backward: find units whose parameters were used outside their forward, and raise RuntimeError if that
        happened during an update. See [Note: parameters used outside their unit's forward]."""
        if not self.overlap:
            return
        for unit in self.units:
            if id(unit) in self._ran_units or id(unit) in self._wait_before_model:
                continue
            if not any(flat.gradients is not None and flat.gradients.touched for flat in unit.flats):
                continue
            if self._launched > LEARNING_STEPS:
                raise RuntimeError(
                    f"parameters of {unit.name} were used outside its modules' forward while their update was still "
                    'running, for the first time: set "zerotop": {"offload": {"overlap": false}}, or use them in '
                    "every step"
                )
            self._wait_before_model.add(id(unit))


def _whole_parameters(unit: Unit) -> Iterator[nn.Parameter]:
    """Those that every rank has at any time; the others wait when they are unsharded."""
    return (parameter for flat in unit.flats if not flat.sharded for parameter in flat.members)
