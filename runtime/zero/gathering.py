"""Stage 3: when each unit's parameters are there. Hooks gather a unit just before it is used, fetch the one that is
expected next meanwhile, and release the others.

forward    pre-forward hook of a unit's modules -> use(unit)
backward   hook on the outputs of that forward, run before the first operation of the unit's backward -> use(unit)
use(unit)  release whoever else is there | wait for its gather | start the gather of the unit expected next

So two units are there at a time, and the root unit, which stays from the first forward to the update. The order of uses
between two boundaries of backward is learned once and followed; a model that takes another way is gathered on demand,
which is right and slower.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.flat import Flat
from runtime.zero.unit import Unit

log = logging.getLogger("runtime.engine")


class Gathering:
    """Drives the units of one model. Does nothing where no flat is sharded."""

    def __init__(self, module: nn.Module, units: Sequence[Unit], telemetry: Telemetry | NullTelemetry) -> None:
        self.units = [unit for unit in units if unit.sharded]
        self.telemetry = telemetry
        self._live: list[Unit] = []
        self._orders: dict[str, list[Unit]] = {}
        """What was used in which order, by kind of pass."""
        self._uses: list[Unit] = []  # of the pass under way
        self._kind = "train"
        self._inside = 0  # forwards of the whole model that are running
        self._interrupted: tuple[list[Unit], bool] = ([], False)
        self._lost = False  # this pass does not follow the learned order
        self._warned = False
        self._hooks: list[Any] = []
        for unit in self.units:
            for member in {module, *owners(module, unit.sharded)} if unit.stays else unit.modules:
                self._watch(unit, member)
        if self.units:
            self._hooks += [
                module.register_forward_pre_hook(self._hook(Gathering._entered_model), prepend=True),
                module.register_forward_hook(self._hook(Gathering._left_model), always_call=True),
            ]

    def detach(self) -> None:
        """Another engine takes over, or none: take the hooks off and leave the parameters whole."""
        for unit in self.units:
            unit.gather()
        self.take_hooks_off()

    def take_hooks_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # ---- hooks -----------------------------------------------------------------------------------------------
    def _watch(self, unit: Unit, member: nn.Module) -> None:
        self._hooks += [
            member.register_forward_pre_hook(self._hook(Gathering._before_forward, unit), prepend=True),
            member.register_forward_hook(self._hook(Gathering._after_forward, unit), always_call=True),
        ]

    def _hook(self, act: Callable[..., None], *bound: Any) -> Callable[..., None]:
        # Weak: torch keeps hooks where the garbage collector can't see that only they hold the engine.
        weak = weakref.ref(self)

        def hook(*given: Any) -> None:
            gathering = weak()
            if gathering is not None:
                act(gathering, *bound, *given)

        return not_compiled(hook)

    def _before_forward(self, unit: Unit, _module: nn.Module, _inputs: Any) -> None:
        if not self._inside:  # a part of the model, called by itself
            self._begin_forward()
        self.use(unit)
        unit.running += 1

    def _after_forward(self, unit: Unit, _module: nn.Module, _inputs: Any, output: Any) -> None:
        unit.running = max(0, unit.running - 1)
        if not torch.is_grad_enabled():
            return
        before = self._hook(Gathering._before_backward, unit)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(before)

    def _before_backward(self, unit: Unit, _gradient: torch.Tensor) -> None:
        self.use(unit)

    def _entered_model(self, _module: nn.Module, _inputs: Any) -> None:
        self._begin_forward()
        self._inside += 1

    def _left_model(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._inside = max(0, self._inside - 1)
        if self._kind == "eval" and not self._inside:
            self._learn()
            self._release_all(but_root=False)
            self._back_to_training()

    def _begin_forward(self) -> None:
        """A forward without gradients is a pass of its own, in the middle of a training pass perhaps."""
        evaluates = not torch.is_grad_enabled() and not _in_backward()
        if self._kind == "eval" and not evaluates:
            self._back_to_training()
        elif self._kind == "train" and evaluates:
            self._interrupted = (self._uses, self._lost)
            self._begin("eval")

    def _back_to_training(self) -> None:
        self._kind = "train"
        self._uses, self._lost = self._interrupted

    # ---- uses ------------------------------------------------------------------------------------------------
    def use(self, unit: Unit) -> None:
        """`unit` is about to compute, forward or backward."""
        if unit.stays:
            if not self._is_live(unit):
                self._gather(unit)
            return
        if self._uses and self._uses[-1] is unit and self._is_live(unit):
            return  # another module of the same unit, or the next tensor of one output
        self._uses.append(unit)
        expected = self._expected()
        for other in [u for u in self._live if u is not unit and u is not expected and not self._holds(u, unit)]:
            self._release(other)
        self._gather(unit)
        if expected is not None and expected is not unit:
            self._live += [expected] * (not self._is_live(expected))
            expected.issue_gather()

    def end_backward(self) -> None:
        """The pass is over: release all but the root unit, and remember the order."""
        if not self.units:
            return
        self._learn()
        self._release_all(but_root=True)
        self._begin("train")

    def stale(self) -> None:
        """Parameters were updated: what is gathered no longer holds."""
        for unit in list(self._live):
            self._release(unit)

    @contextmanager
    def everything(self, units: Sequence[Unit] | None = None) -> Iterator[None]:
        """Inside, the parameters of `units` (default: all) are there; every rank must enter."""
        wanted = [unit for unit in (self.units if units is None else units) if unit.sharded]
        missing = [unit for unit in wanted if not self._is_live(unit)]
        for unit in wanted:  # also one that is only on its way
            self._gather(unit)
            unit.asked_for += 1
        try:
            yield
        finally:
            for unit in wanted:
                unit.asked_for -= 1
            for unit in missing:
                if not unit.asked_for:
                    self._release(unit)

    def _expected(self) -> Unit | None:
        """Who comes next after the uses so far, if this pass goes as it was learned."""
        order, at = self._orders.get(self._kind), len(self._uses)
        if order is None or self._lost:
            return None
        if at > len(order) or order[at - 1] is not self._uses[-1]:
            self._lost = True
            if not self._warned and self._kind == "train":
                self._warned = True
                name = self._uses[-1].name
                log.warning(
                    f"stage 3: {name} is used where {order[at - 1].name if at <= len(order) else 'nothing more'} was "
                    "expected; this model takes different ways, so units are gathered without looking ahead (slower)"
                )
            return None
        return order[at] if at < len(order) else None

    def _holds(self, other: Unit, unit: Unit) -> bool:
        """Whether `other` has to stay while `unit` is used: its forward is still running around it."""
        if other.stays or other.nested or other.asked_for:
            return True
        other.nested = other.running > 0 and not _in_backward()
        return other.nested

    def _learn(self) -> None:
        if self._uses and (self._kind not in self._orders or self._lost):
            self._orders[self._kind] = list(self._uses)

    def _begin(self, kind: str) -> None:
        self._kind, self._lost = kind, False
        self._uses = []

    def _is_live(self, unit: Unit) -> bool:
        return any(unit is live for live in self._live)

    def _gather(self, unit: Unit) -> None:
        if not self._is_live(unit):
            self._live.append(unit)
        with self.telemetry.span("gather"):
            unit.gather()

    def _release(self, unit: Unit) -> None:
        self._live = [live for live in self._live if live is not unit]
        unit.release()

    def _release_all(self, but_root: bool) -> None:
        for unit in list(self._live):
            if not (unit.asked_for or (but_root and unit.stays)):
                self._release(unit)


def owners(module: nn.Module, flats: Sequence[Flat]) -> Iterator[nn.Module]:
    """The modules that have parameters of `flats` as their own: scripts may call one without the whole model."""
    members = {parameter for flat in flats for parameter in flat.members}
    for owner in module.modules():
        if any(parameter in members for parameter in owner._parameters.values() if parameter is not None):
            yield owner


def not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Keeps torch.compile from looking into `hook`. torch.compiler.disable alone would import the compiler, 100 MB, for
    those who don't use it; where it comes later, the mark makes it stop there."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(hook)  # type: ignore[no-any-return]
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
