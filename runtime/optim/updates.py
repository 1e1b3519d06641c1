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

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from runtime.comm import Done, Pending
from runtime.offload.upload import HostSide
from runtime.optim.shard_optimizer import Hyper, Rule
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.flat import Flat
from runtime.zero.hooks import EngineHook
from runtime.zero.unit import Unit
from runtime.zero.unshard import owners

LEARNING_STEPS = 2
"""Updates without overlap at the start: see the note."""


class Updates:
    """Drives the rules of one engine. `rules` are those of the units' trained flats, in forward order."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        rules: Sequence[Rule],
        telemetry: Telemetry | NullTelemetry,
        executor: Executor | None = None,
        host: HostSide | None = None,
        overlap: bool = True,
        on_idle: Callable[[], None] = lambda: None,
        before: Callable[[Flat], None] = lambda flat: None,
    ) -> None:
        """executor: one thread, for flats whose states are offloaded; None: none are. host: what those rules use, where
        they need it. overlap: whether the next forward runs meanwhile. on_idle: called when nothing is under way any
        more. before: returns when a flat may change: a checkpoint may still read it."""
        self._before = before
        self.rules, self.telemetry, self.executor, self.host = list(rules), telemetry, executor, host
        self.overlap, self.on_idle = overlap and executor is not None, on_idle
        self._stream: Any = None
        """Of the training thread on a GPU: whoever waits, it is the one that goes on with the parameters."""
        self.units = [unit for unit in units if unit.flats]
        self._jobs: list[Future[None] | None] = []
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
            everywhere = unit.stays or whole
            self._early |= {id(unit)} if everywhere else set()
            for member in {module, *owners(module, unit.flats)} if everywhere else unit.modules:
                before = EngineHook(self, Updates._before_forward, unit)
                self._hooks.append(member.register_forward_pre_hook(before, prepend=True))
            for flat in unit.flats:
                flat.before_gather = self._waiter(flat)
        self._hooks.append(module.register_forward_pre_hook(EngineHook(self, Updates._before_model), prepend=True))

    def _waiter(self, flat: Flat) -> Callable[[], None]:
        weak, position = weakref.ref(self), [rule.flat for rule in self.rules].index(flat)

        def wait() -> None:
            updates = weak()
            if updates is not None and position < len(updates._jobs):
                updates._own_is_ready(position)

        return wait

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
        device = self.rules[0].flat.comm.device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self.host is not None:
            self.host.after = self.host.transfers.mark()
        self._called.clear()
        self._at = 0
        self._writes = [rule.flat.writes() for rule in self.rules]
        self._jobs = [self._submitted(rule, groups, step, scale) for rule in self.rules]
        overlap = self.overlap and self._taken >= LEARNING_STEPS
        self._taken += 1
        if not overlap:
            self._all_now(groups, step, scale)
            return
        for rule, job in zip(self.rules, self._jobs, strict=True):
            if job is None:
                self._update(rule, groups, step, scale)

    def _submitted(self, rule: Rule, groups: Sequence[Hyper], step: int, scale: float) -> Future[None] | None:
        """None: the training thread updates it."""
        if self.executor is None or not rule.flat.home.offloaded:
            return None
        return self.executor.submit(self._update, rule, groups, step, scale)

    def _update(self, rule: Rule, groups: Sequence[Hyper], step: int, scale: float) -> None:
        self._before(rule.flat)
        rule.update(groups, step, scale)

    def _all_now(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        """Every unit in forward order; while one is gathered the next is updated already."""
        gathers = []
        for position, rule in enumerate(self.rules):
            if self._jobs[position] is None:
                self._update(rule, groups, step, scale)
            self._own_is_ready(position)
            gathers.append(self._gather(rule.flat))
        with self.telemetry.span("gather"):
            for gather in gathers:
                gather.wait()
        self._unread = gathers
        self._idle()

    def _gather(self, flat: Flat) -> Pending:
        if flat.arrival is not None:
            flat.arrival.wait_device()
            flat.arrival = None
        flat.note_values()
        return Done() if flat.sharded else flat.gather_updated()

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
        self._jobs = []
        self._at = 0
        self.on_idle()

    def _finish(self, end: int) -> None:
        with self._on_training_stream():
            while self._at < end:
                self._own_is_ready(self._at)
                flat = self.rules[self._at].flat
                if flat.writes() != self._writes[self._at]:
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

    def _own_is_ready(self, position: int) -> None:
        job, flat = self._jobs[position], self.rules[position].flat
        if job is not None and not job.done():
            with self.telemetry.span("offload"):
                job.result()
        elif job is not None:
            job.result()
        if flat.arrival is not None:
            flat.arrival.wait_device()

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
