"""Who updates which unit when. Without offload: all of them, in forward order, inside engine.step(). With it:

thread    | update embedding | update 0 | update 1 | update 2 | ...
training  | step() |    wait | forward embedding | wait, gather 0 | forward 0 | gather 1 | forward 1 | ...

The forward waits only for the unit it needs next, so most of the update hides behind it. New parameters are gathered in
the order of updates on every rank, whichever way its model takes, and all of them before backward begins.

[Note: parameters used outside their unit's forward]
A hook in front of each unit's forward is what waits. A model that reads a parameter elsewhere (a weight that another
module hands to a function) would read it too early. So the first steps don't overlap; a unit whose parameters receive
gradients although none of its modules ran is then known, and waited for when the whole model's forward begins. One that
does so later for the first time is an error, not a wrong result.
"""

from __future__ import annotations

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
from runtime.zero.unit import Unit
from runtime.zero.unshard import owners

LEARNING_STEPS = 2
"""Updates without overlap at the start: see the note."""


class Updates:
    """Drives the optimizers of one engine's shards, which come in forward order."""

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
        """executor: one thread, for shards whose states are offloaded; None: none are. mark: the point that the
        computing stream has reached, for copies that come after it. overlap: whether the next forward runs meanwhile.
        on_idle: called when nothing is under way any more. before: returns when a shard may change: a checkpoint may
        still be reading it."""
        self._before = before
        self.shard_optimizers = list(shard_optimizers)
        self._positions = {id(optimizer.flat): position for position, optimizer in enumerate(self.shard_optimizers)}
        self.telemetry, self.executor, self._mark = telemetry, executor, mark
        self.overlap, self.on_idle = overlap and executor is not None, on_idle
        self._stream: Any = None
        """Of the training thread on a GPU: whoever waits, it is the one that goes on with the parameters."""
        self.units = [unit for unit in units if unit.flats]
        self._jobs: list[Future[Copy | None] | None] = []
        """Of each shard, the update on the other thread; None: the training thread updates it."""
        self._copies: list[Copy | None] = []
        """Of each shard that the training thread has updated, what brings its new parameters to the device."""
        self._unread: list[Pending] = []
        """Gathers that other ranks may still be reading from this rank."""
        self._writes: list[int] = []
        """Of each flat, what a script had written in place when its update began."""
        self._at = 0  # jobs before this one are finished, and their parameters gathered
        self._ends: dict[int, int] = {}  # id of a unit -> its flats are finished when _at is this
        end = 0
        for unit in self.units:
            end += len(unit.flats)
            self._ends[id(unit)] = end
        self._taken = 0
        self._early: set[int] = set()
        """ids of units that are waited for when the model's forward begins."""
        self._called: set[int] = set()
        """ids of units of which a module ran since the last update."""
        self._hooks: list[Any] = []
        if self.overlap:
            self._watch(module)

    def _watch(self, module: nn.Module) -> None:
        whole = hasattr(module, "_orig_mod")  # compiled as one: hooks inside would cut it into pieces
        for unit in self.units:
            everywhere = unit.keep_unsharded or whole
            self._early |= {id(unit)} if everywhere else set()
            for member in {module, *owners(module, unit.flats)} if everywhere else unit.modules:
                before = EngineHook(self, Updates._before_forward, unit)
                self._hooks.append(member.register_forward_pre_hook(before, prepend=True))
        self._hooks.append(module.register_forward_pre_hook(EngineHook(self, Updates._before_model), prepend=True))

    def wait_for_shard(self, flat: FlatParamGroup) -> None:
        """Returns when this rank's shard of `flat` holds the last step's parameters. On a GPU: when work that the
        current stream gets from now on does."""
        position = self._positions.get(id(flat))
        if position is not None and position < len(self._jobs):
            self._shard_is_ready(position)

    def detach(self) -> None:
        """Another engine takes over, or none."""
        try:
            self.drain()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    # ---- the step --------------------------------------------------------------------------------------------------
    def launch(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        """Optimizer step `step` with gradient x `scale`. What is left to do afterwards, `need` and `drain` wait for."""
        self.drain()
        device = self.shard_optimizers[0].flat.comm.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        numbers = OptimizerStep(groups, step, scale, self._mark())
        self._called.clear()
        self._at = 0
        self._writes = [optimizer.flat.in_place_writes() for optimizer in self.shard_optimizers]
        self._copies = [None] * len(self.shard_optimizers)
        self._jobs = [self._submitted(optimizer, numbers) for optimizer in self.shard_optimizers]
        overlap = self.overlap and self._taken >= LEARNING_STEPS
        self._taken += 1
        if not overlap:
            self._all_now(numbers)
            return
        for position, job in enumerate(self._jobs):
            if job is None:
                self._copies[position] = self._update(self.shard_optimizers[position], numbers)

    def _submitted(self, optimizer: ShardOptimizer, numbers: OptimizerStep) -> Future[Copy | None] | None:
        """None: the training thread updates it."""
        if self.executor is None or not optimizer.flat.placement.offloaded:
            return None
        return self.executor.submit(self._update, optimizer, numbers)

    def _update(self, optimizer: ShardOptimizer, numbers: OptimizerStep) -> Copy | None:
        self._before(optimizer.flat)
        with profiler_range("update", optimizer.flat.policy.stage, optimizer.flat.name):
            return optimizer.update(numbers)

    def _all_now(self, numbers: OptimizerStep) -> None:
        """Every unit in forward order; while one is all-gathered the next is updated already."""
        gathers = []
        for position, optimizer in enumerate(self.shard_optimizers):
            if self._jobs[position] is None:
                self._copies[position] = self._update(optimizer, numbers)
            self._shard_is_ready(position)
            gathers.append(self._gather(optimizer.flat))
        with self.telemetry.span("gather"):
            for gather in gathers:
                gather.wait()
        self._unread = gathers
        self._idle()

    def _gather(self, flat: FlatParamGroup) -> Pending:
        flat.record_fingerprint()
        return Done() if flat.sharded else flat.all_gather_updated()

    @property
    def under_way(self) -> bool:
        return self._at < len(self._jobs)

    # ---- waiting ---------------------------------------------------------------------------------------------------
    def need(self, unit: Unit) -> None:
        """Returns when the parameters of `unit`, and of all units before it, are those of the last step."""
        if self.under_way:
            self._finish(self._ends[id(unit)])

    def drain(self) -> None:
        """Returns when all of the last step is done. Raises what went wrong in it."""
        if self.under_way:
            self._finish(len(self._jobs))
        self._idle()

    def _idle(self) -> None:
        """Nothing is under way any more: the script may read and write parameters, so nobody may still be reading them
        from this rank's memory."""
        for gather in self._unread:
            gather.fence()
        self._unread = []
        self._jobs, self._copies = [], []
        self._at = 0
        self.on_idle(self)

    def _finish(self, end: int) -> None:
        with self._on_training_stream():
            while self._at < end:
                self._shard_is_ready(self._at)
                flat = self.shard_optimizers[self._at].flat
                if flat.in_place_writes() != self._writes[self._at]:
                    raise RuntimeError(
                        f"parameters of {flat.name} were changed in place while their offloaded update was still "
                        "running, which would overwrite the change: call engine.synchronize() before it"
                    )
                gather = self._gather(flat)
                with self.telemetry.span("gather"):
                    gather.wait()
                self._unread.append(gather)
                self._at += 1

    @contextmanager
    def _on_training_stream(self) -> Iterator[None]:
        """On a GPU: what is waited for inside, the training's stream waits for, and the current one after it."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            yield
        if current != self._stream:
            current.wait_stream(self._stream)

    def _shard_is_ready(self, position: int) -> None:
        job, copy = self._jobs[position], self._copies[position]
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
            if id(unit) in self._early:
                self.need(unit)

    def _before_forward(self, unit: Unit, *_given: Any) -> None:
        self._called.add(id(unit))
        self.need(unit)

    def check(self) -> None:
        """After a backward: see [Note: parameters used outside their unit's forward]. Raises RuntimeError."""
        if not self.overlap:
            return
        for unit in self.units:
            if id(unit) in self._called or id(unit) in self._early:
                continue
            if not any(flat.gradients is not None and flat.gradients.touched for flat in unit.flats):
                continue
            if self._taken > LEARNING_STEPS:
                raise RuntimeError(
                    f"parameters of {unit.name} were used outside its modules' forward while their update was still "
                    'running, for the first time: set "zerotop": {"offload": {"overlap": false}}, or use them in '
                    "every step"
                )
            self._early.add(id(unit))
