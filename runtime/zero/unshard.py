"""Stage 3: when each unit's parameters are unsharded. Hooks unshard a unit just before it is used, start the all-gather
of the one that is expected next meanwhile, and reshard the others.

forward    pre-forward hook of a unit's modules -> use(unit)
backward   hook on the outputs of that forward, run before the first operation of the unit's backward -> use(unit)
use(unit)  reshard the others | wait for its all-gather | start the all-gather of the unit expected next

So two units are unsharded at a time, and the root unit, which stays so from the first forward to the update. The order
of uses between two boundaries of backward is learned once and followed; a model that takes another way is unsharded on
demand, which is right and slower.
"""

from __future__ import annotations

import logging
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.flat import FlatParamGroup
from runtime.zero.hooks import EngineHook
from runtime.zero.parameter import may_be_resharded
from runtime.zero.unit import Unit

log = logging.getLogger("runtime.engine")


class Unsharder:
    """Drives the units of one model. Does nothing where no flat is sharded."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        telemetry: Telemetry | NullTelemetry,
        gather_objects: Callable[[Any], list[Any]],
        before_unshard: Callable[[FlatParamGroup], None] = lambda flat: None,
    ) -> None:
        """gather_objects: hands every rank's value to every rank. before_unshard: returns when this rank's shard of a
        parameter group is up to date."""
        self._before_unshard = before_unshard
        self.units = [unit for unit in units if unit.sharded]
        self._gather_objects = gather_objects
        self.telemetry = telemetry
        self._live: list[Unit] = []
        self._orders: dict[str, list[Unit]] = {}
        """What was used in which order, by kind of pass."""
        self._uses: list[Unit] = []  # of the pass under way
        self._kind = "train"
        self._inside = 0  # forwards of the whole model that are running
        self._open = False
        """Between the beginning of a forward and the end of the backward."""
        self._training = False
        """The same of a forward with gradients."""
        self._met = "train"
        self._interrupted: tuple[list[Unit], bool] = ([], False)
        self._lost = False  # this pass does not follow the learned order
        self._warned = False
        self.execution_hash = 0
        """Of the units that were unsharded since `take_execution_hash`, in order: equal on ranks that ran the same
        modules in the same order."""
        self._hooks: list[Any] = []
        self._elsewhere = [_Elsewhere(self, unit) for unit in self.units]
        for elsewhere, unit in zip(self._elsewhere, self.units, strict=True):
            for flat in unit.sharded:
                for slot, parameter in zip(flat.layout.slots, flat.members, strict=True):
                    may_be_resharded(slot.name, parameter, elsewhere)
        for unit in self.units:
            outer = [module] if unit.keep_unsharded else unit.modules
            inner = [owner for owner in owners(module, unit.sharded) if not any(owner is other for other in outer)]
            for member in outer:
                self._watch(unit, member, opaque=True)
            for member in inner:  # scripts may call one without what is around it
                self._watch(unit, member, opaque=False)
        if self.units:
            self._hooks += [
                module.register_forward_pre_hook(EngineHook(self, Unsharder._entered_model), prepend=True),
                module.register_forward_hook(EngineHook(self, Unsharder._left_model), always_call=True),
            ]

    def detach(self) -> None:
        """Another engine takes over, or none: take the hooks off and leave the parameters whole."""
        for unit in self.units:
            unit.unshard(self._before_unshard)
        self.remove_hooks()

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # ---- hooks -----------------------------------------------------------------------------------------------
    def _watch(self, unit: Unit, member: nn.Module, opaque: bool) -> None:
        before = EngineHook(self, Unsharder._before_forward, unit, opaque=opaque)
        after = EngineHook(self, Unsharder._after_forward, unit, opaque=opaque)
        self._hooks += [
            member.register_forward_pre_hook(before, prepend=True),
            member.register_forward_hook(after, always_call=True),
        ]

    def _before_forward(self, unit: Unit, _module: nn.Module, _inputs: Any) -> None:
        unit.running += 1
        if unit.running > 1 and self._is_live(unit):
            return  # inside a forward that has seen to it
        if not self._inside:  # a part of the model, called by itself
            self._begin_forward()
        self.use(unit)

    def _after_forward(self, unit: Unit, module: nn.Module, _inputs: Any, output: Any) -> None:
        unit.running = max(0, unit.running - 1)
        if unit.running or not torch.is_grad_enabled():
            return
        before = EngineHook(self, Unsharder._before_backward, unit)
        for tensor in results(output, module):
            tensor.register_hook(before)

    def _before_backward(self, unit: Unit, _gradient: torch.Tensor) -> None:
        self.use(unit)

    def used_elsewhere(self, unit: Unit) -> bool:
        """Something computes with a parameter of `unit` that no hook has seen coming, and whose backward none will see:
        from now on the unit is treated like the root unit. False between two passes, when the other ranks may not be
        here: see [Note: parameters change their class]."""
        if not self._open:
            return False
        if not unit.keep_unsharded and not unit.running:
            unit.keep_unsharded = True
            self._orders = {kind: [used for used in order if used is not unit] for kind, order in self._orders.items()}
            self._uses = [used for used in self._uses if used is not unit]
            log.warning(
                f"stage 3: parameters of {unit.name} are used outside their modules' forward; they are kept whole from "
                "forward to the update (more memory)"
            )
        self.use(unit)
        return True

    def _entered_model(self, _module: nn.Module, _inputs: Any) -> None:
        self._begin_forward()
        if not self._inside:
            self._meet()
        self._inside += 1

    def _meet(self) -> None:
        """Forwards without gradients come in numbers that only the script knows (generate() until all sequences end).
        Each one that needs gathers asks the other ranks whether they are in one, too, and so does the first training
        forward after them. Raises RuntimeError on every rank if not: gathers of two different passes would mix."""
        kind = self._kind
        if kind == "eval" and all(self._is_live(unit) for unit in self.units):
            return
        if kind == "train" and self._met != "eval":
            return
        self._met = kind
        kinds = self._gather_objects(kind)
        if len(set(kinds)) > 1:
            train, evaluate = kinds.index("train"), kinds.index("eval")
            raise RuntimeError(
                f"stage 3: rank {evaluate} begins another forward without gradients, and rank {train} has gone on to "
                "training. Every forward gathers parameters from all ranks, so all must run the same number of them: "
                "pad the evaluation data (DistributedSampler), call generate(synced_gpus=True), or evaluate inside "
                "zero.GatheredParameters(model)"
            )

    def _left_model(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._inside = max(0, self._inside - 1)
        if sys.exc_info()[0] is not None and not self._inside and self._kind == "train":
            self._begin("train")  # it was given up: nobody will go back through it
        if self._kind == "eval" and not self._inside:
            self._learn()
            self._release_all(but_root=self._training)  # which a forward with gradients may have left for backward
            self._back_to_training()

    def _begin_forward(self) -> None:
        """A forward without gradients is a pass of its own, in the middle of a training pass perhaps."""
        evaluates = not torch.is_grad_enabled() and not _in_backward()
        self._open = True
        self._training |= not evaluates
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
        if unit.keep_unsharded:
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
            self._note_issued(expected, expected.issue_unshard(self._before_unshard))

    def end_backward(self) -> None:
        """The pass is over: release all but the root unit, and remember the order."""
        if not self.units:
            return
        self._learn()
        self._open = self._training = False
        self._release_all(but_root=True)
        self._begin("train")

    def take_execution_hash(self) -> int:
        """`execution_hash` in 20 bits; it begins anew."""
        found, self.execution_hash = self.execution_hash & 0xFFFFF, 0
        return found

    def reshard_all(self) -> None:
        """Parameters were updated: what is gathered no longer holds."""
        self._open = self._training = False
        for unit in list(self._live):
            self._release(unit)

    @contextmanager
    def unsharded(self, units: Sequence[Unit] | None = None) -> Iterator[None]:
        """Inside, the parameters of `units` (default: all) are there; every rank must enter."""
        wanted = [unit for unit in (self.units if units is None else units) if unit.sharded]
        missing = [unit for unit in wanted if not self._is_live(unit)]
        for unit in wanted:  # also one that is only on its way
            self._gather(unit)
            unit.unshard_refs += 1
        try:
            yield
        finally:
            for unit in wanted:
                unit.unshard_refs -= 1
            for unit in missing:
                if not unit.unshard_refs:
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
        if other.keep_unsharded or other.nested or other.unshard_refs:
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
            self._note_issued(unit, unit.unshard(self._before_unshard))

    def _note_issued(self, unit: Unit, issued: bool) -> None:
        if issued:
            self.execution_hash = zlib.crc32(f"{self._kind}/{unit.name}".encode(), self.execution_hash)

    def _release(self, unit: Unit) -> None:
        self._live = [live for live in self._live if live is not unit]
        unit.reshard()

    def _release_all(self, but_root: bool) -> None:
        for unit in list(self._live):
            if not (unit.unshard_refs or (but_root and unit.keep_unsharded)):
                self._release(unit)


class _Elsewhere:
    """What the parameters of `unit` ask when code computes with them while they are resharded."""

    def __init__(self, unsharder: Unsharder, unit: Unit) -> None:
        self._unsharder, self._unit = weakref.ref(unsharder), unit

    def unshard_for_use(self) -> bool:
        unsharder = self._unsharder()
        return unsharder is not None and unsharder.used_elsewhere(self._unit)


def results(output: Any, module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors through which backward enters a forward: what it returned, in whatever it is packed, and what it left
    in attributes (the auxiliary losses of experts)."""
    seen: set[int] = set()
    queue = [output, *(value for member in module.modules() for value in vars(member).values() if _may_hold(value))]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.requires_grad and value.grad_fn is not None:
                yield value
        elif isinstance(value, Mapping):
            queue += value.values()
        elif isinstance(value, (list, tuple, set)):
            queue += value
        elif (
            hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, ModuleType)) and not callable(value)
        ):
            queue += vars(value).values()


def _may_hold(value: Any) -> bool:
    """Whether an attribute of a module may be a result of its forward."""
    if isinstance(value, torch.Tensor):
        return value.grad_fn is not None
    return isinstance(value, (list, tuple)) and any(isinstance(entry, torch.Tensor) for entry in value)


def owners(module: nn.Module, flats: Sequence[FlatParamGroup]) -> Iterator[nn.Module]:
    """The modules that have parameters of `flats` as their own: scripts may call one without the whole model."""
    members = {parameter for flat in flats for parameter in flat.members}
    for owner in module.modules():
        if any(parameter in members for parameter in owner._parameters.values() if parameter is not None):
            yield owner


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
