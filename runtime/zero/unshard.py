"""Stage 3: when each unit's parameters are unsharded. Hooks unshard a unit just before it computes, start the
all-gather of the unit that is expected next, and reshard the others.

forward    pre-forward hook of a unit's modules                                                -> before_compute(unit)
backward   hook on the outputs of that forward, before the first operation of unit's backward  -> before_compute(unit)
before_compute(unit)   reshard other units | wait for the all-gather of `unit` | start that of the expected unit

So two units are unsharded at a time, and the root unit, which stays so from the first forward to the update. The order
in which a pass (forward and backward) uses units is learned in the first one. Units that are used in another order are
unsharded on demand, which is correct but slower.
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

from runtime.models.lockstep import Lockstep
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.flat import FlatParamGroup
from runtime.zero.hooks import EngineHook
from runtime.zero.parameter import register_sharded
from runtime.zero.unit import Unit

log = logging.getLogger("runtime.engine")


class Unsharder:
    """Unshards and reshards the units of one model. Does nothing if no parameter group is sharded."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        telemetry: Telemetry | NullTelemetry,
        gather_objects: Callable[[Any], list[Any]],
        before_unshard: Callable[[FlatParamGroup], None] = lambda flat: None,
        before_change: Callable[[FlatParamGroup], None] = lambda flat: None,
    ) -> None:
        """gather_objects: returns every rank's value on every rank. before_unshard: waits until this rank's shard of a
        parameter group is up to date. before_change: waits until it may be written."""
        self._before_unshard, self._before_change = before_unshard, before_change
        self.units = [unit for unit in units if unit.sharded]
        self._gather_objects = gather_objects
        self.telemetry = telemetry
        self._live: list[Unit] = []
        """Units that are unsharded, or whose all-gather is under way."""
        self._orders: dict[str, list[Unit]] = {}
        """Kind of pass ("train" or "eval") -> the learned order of units."""
        self._used_units: list[Unit] = []
        """Units that the current pass has used, in order."""
        self._pass_kind = "train"
        self._forward_depth = 0  # forwards of the full model that are running
        self._in_pass = False
        """Whether a forward has begun and its backward has not ended."""
        self._in_training_pass = False
        """The same for forwards with gradients only."""
        self._last_checked = "train"
        """Kind of the last pass for which the ranks compared their kinds."""
        self._interrupted_pass: tuple[list[Unit], bool] = ([], False)
        """_used_units and _left_order of a training pass in the middle of which an evaluation runs."""
        self._left_order = False  # this pass does not follow the learned order
        self._warned_order = False
        self.execution_hash = 0
        """Hash of the units that were unsharded since `take_execution_hash`, in order: equal on ranks that ran the same
        modules in the same order."""
        self._hooks: list[Any] = []
        self._on_demand = [_UnitOnDemand(self, unit) for unit in self.units]
        for on_demand, unit in zip(self._on_demand, self.units, strict=True):
            for flat in unit.sharded:
                for slot, parameter in zip(flat.layout.slots, flat.members, strict=True):
                    register_sharded(slot.name, parameter, on_demand)
        for unit in self.units:
            outer = [module] if unit.keep_unsharded else unit.modules
            inner = [owner for owner in owners(module, unit.sharded) if not any(owner is other for other in outer)]
            for member in outer:
                self._watch(unit, member, opaque=True)
            for member in inner:  # scripts may call one of them directly
                self._watch(unit, member, opaque=False)
        if self.units:
            self._hooks += [
                module.register_forward_pre_hook(EngineHook(self, Unsharder._before_model_forward), prepend=True),
                module.register_forward_hook(EngineHook(self, Unsharder._after_model_forward), always_call=True),
                Lockstep(module),
            ]

    def detach(self) -> None:
        """Remove the hooks and leave the parameters unsharded: the engine gives the model up."""
        for unit in self.units:
            unit.unshard(self._before_unshard)
        self.remove_hooks()

    def remove_hooks(self) -> None:
        """Remove the hooks and leave the parameters as they are."""
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
        if unit.running == 1:
            unit.first_node = torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if unit.running > 1 and self._is_live(unit):
            return  # an outer forward of the same unit has unsharded it
        if not self._forward_depth:  # the script calls a part of the model directly
            self._begin_forward()
        self.before_compute(unit)

    def _after_forward(self, unit: Unit, module: nn.Module, _inputs: Any, output: Any) -> None:
        unit.running = max(0, unit.running - 1)
        if unit.running or not torch.is_grad_enabled():
            return
        before = EngineHook(self, Unsharder._before_backward, unit)
        for tensor in results(output, module, unit.first_node):
            tensor.register_hook(before)

    def _before_backward(self, unit: Unit, _gradient: torch.Tensor) -> None:
        self.before_compute(unit)

    def unshard_outside_forward(self, unit: Unit) -> bool:
        """Unshard `unit`, one of whose parameters is used outside its modules' forward. Because no hook will see the
        backward of that use, the unit is kept unsharded from now on, like the root unit. Returns False between two
        passes, when the other ranks may not do the same: see [Note: parameters change their class]."""
        if not self._in_pass:
            return False
        if not unit.keep_unsharded and not unit.running:
            unit.keep_unsharded = True
            self._orders = {kind: [used for used in order if used is not unit] for kind, order in self._orders.items()}
            self._used_units = [used for used in self._used_units if used is not unit]
            log.warning(
                f"stage 3: parameters of {unit.name} are used outside their modules' forward; they are kept unsharded "
                "from the forward to the update (more memory)"
            )
        self.before_compute(unit)
        return True

    def _before_model_forward(self, _module: nn.Module, _inputs: Any) -> None:
        self._begin_forward()
        if not self._forward_depth:
            self._check_same_pass()
        self._forward_depth += 1

    def _check_same_pass(self) -> None:
        """Check that all ranks begin the same kind of pass, because only the script knows how many forwards without
        gradients there are (generate() runs until all sequences end). Called before each of them that all-gathers, and
        before the first training forward after them. Raises RuntimeError on every rank if the kinds differ, since
        all-gathers of two different passes would mix."""
        kind = self._pass_kind
        if kind == "eval" and all(self._is_live(unit) for unit in self.units):
            return
        if kind == "train" and self._last_checked != "eval":
            return
        self._last_checked = kind
        kinds = self._gather_objects(kind)
        if len(set(kinds)) > 1:
            train, evaluate = kinds.index("train"), kinds.index("eval")
            raise RuntimeError(
                f"stage 3: rank {evaluate} begins another forward without gradients, but rank {train} has gone on to "
                "training. Every forward all-gathers parameters, so all ranks must run the same number of them: "
                "pad the evaluation data (DistributedSampler), call generate(synced_gpus=True), or evaluate inside "
                "zero.GatheredParameters(model)"
            )

    def _after_model_forward(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._forward_depth = max(0, self._forward_depth - 1)
        if sys.exc_info()[0] is not None and not self._forward_depth and self._pass_kind == "train":
            self._begin_pass("train")  # the forward failed, so there is no backward through it
        if self._pass_kind == "eval" and not self._forward_depth:
            self._learn_order()
            self._reshard_live(but_root=self._in_training_pass)  # a backward may still need the root unit
            self._resume_training()

    def _begin_forward(self) -> None:
        """Begin or continue a pass. A forward without gradients is one of its own, perhaps inside a training pass."""
        evaluates = not torch.is_grad_enabled() and not _in_backward()
        self._in_pass = True
        self._in_training_pass |= not evaluates
        if self._pass_kind == "eval" and not evaluates:
            self._resume_training()
        elif self._pass_kind == "train" and evaluates:
            self._interrupted_pass = (self._used_units, self._left_order)
            self._begin_pass("eval")

    def _resume_training(self) -> None:
        self._pass_kind = "train"
        self._used_units, self._left_order = self._interrupted_pass

    # ---- unshard and reshard ---------------------------------------------------------------------------------
    def before_compute(self, unit: Unit) -> None:
        """Unshard `unit`, whose forward or backward is about to run."""
        if unit.keep_unsharded:
            if not self._is_live(unit):
                self._unshard(unit)
            return
        if self._used_units and self._used_units[-1] is unit and self._is_live(unit):
            return  # another module of the same unit, or another tensor of the same output
        self._used_units.append(unit)
        expected = self._expected()
        for other in [u for u in self._live if u is not unit and u is not expected and not self._must_stay(u, unit)]:
            self._reshard(other)
        self._unshard(unit)
        if expected is not None and expected is not unit:
            self._live += [expected] * (not self._is_live(expected))
            self._hash_issued(expected, expected.issue_unshard(self._before_unshard))

    def end_backward(self) -> None:
        """End the pass: reshard all units but the root unit, and learn the order."""
        if not self.units:
            return
        self._learn_order()
        self._in_pass = self._in_training_pass = False
        self._reshard_live(but_root=True)
        self._begin_pass("train")

    def take_execution_hash(self) -> int:
        """Return `execution_hash` in 20 bits and reset it."""
        found, self.execution_hash = self.execution_hash & 0xFFFFF, 0
        return found

    def reshard_all(self, keep_writes: bool = True) -> None:
        """Reshard all units, because their shards are about to change, or (keep_writes=False) have changed."""
        self._in_pass = self._in_training_pass = False
        for unit in list(self._live):
            self._reshard(unit, keep_writes)

    @contextmanager
    def unsharded(self, units: Sequence[Unit] | None = None) -> Iterator[None]:
        """Inside, the parameters of `units` (default: all) are unsharded. Every rank must enter. What is written into
        them is not kept."""
        wanted = [unit for unit in (self.units if units is None else units) if unit.sharded]
        missing = [unit for unit in wanted if not self._is_live(unit)]
        for unit in wanted:  # also those whose all-gather is under way
            self._unshard(unit)
            self._keep_writes(unit)
            unit.unshard_refs += 1
        try:
            yield
        finally:
            for unit in wanted:
                unit.unshard_refs -= 1
                for flat in unit.sharded:
                    flat.forget_writes()
            for unit in missing:
                if not unit.unshard_refs:
                    self._reshard(unit, keep_writes=False)

    def _expected(self) -> Unit | None:
        """The unit that comes next in the learned order, if this pass has followed it."""
        order, at = self._orders.get(self._pass_kind), len(self._used_units)
        if order is None or self._left_order:
            return None
        if at > len(order) or order[at - 1] is not self._used_units[-1]:
            self._left_order = True
            if not self._warned_order and self._pass_kind == "train":
                self._warned_order = True
                name = self._used_units[-1].name
                log.warning(
                    f"stage 3: {name} ran where {order[at - 1].name if at <= len(order) else 'no further unit'} was "
                    "expected; the order of this model's modules varies, so units are unsharded without prefetching "
                    "(slower)"
                )
            return None
        return order[at] if at < len(order) else None

    def _must_stay(self, other: Unit, unit: Unit) -> bool:
        """Whether `other` has to stay unsharded while `unit` computes, because it is kept or its forward is running."""
        if other.keep_unsharded or other.nested or other.unshard_refs:
            return True
        other.nested = other.running > 0 and not _in_backward()
        return other.nested

    def _learn_order(self) -> None:
        if self._used_units and (self._pass_kind not in self._orders or self._left_order):
            self._orders[self._pass_kind] = list(self._used_units)

    def _begin_pass(self, kind: str) -> None:
        self._pass_kind, self._left_order = kind, False
        self._used_units = []

    def _is_live(self, unit: Unit) -> bool:
        return any(unit is live for live in self._live)

    def _unshard(self, unit: Unit) -> None:
        if not self._is_live(unit):
            self._live.append(unit)
        with self.telemetry.span("gather"):
            self._hash_issued(unit, unit.unshard(self._before_unshard))

    def _hash_issued(self, unit: Unit, issued: bool) -> None:
        if issued:
            self.execution_hash = zlib.crc32(f"{self._pass_kind}/{unit.name}".encode(), self.execution_hash)

    def _reshard(self, unit: Unit, keep_writes: bool = True) -> None:
        if keep_writes:
            self._keep_writes(unit)
        self._live = [live for live in self._live if live is not unit]
        unit.reshard()

    def _keep_writes(self, unit: Unit) -> None:
        """Keep what the model's forward wrote into the parameters of `unit`, the same on every rank."""
        for flat in unit.sharded:
            if flat.written_while_unsharded():
                self._before_change(flat)
                flat.keep_writes()

    def _reshard_live(self, but_root: bool) -> None:
        for unit in list(self._live):
            if not (unit.unshard_refs or (but_root and unit.keep_unsharded)):
                self._reshard(unit)


class _UnitOnDemand:
    """Unshards `unit` when code computes with one of its parameters while that is resharded (parameter.Unsharder)."""

    def __init__(self, unsharder: Unsharder, unit: Unit) -> None:
        self._unsharder, self._unit = weakref.ref(unsharder), unit

    def unshard_for_use(self) -> bool:
        """See parameter.Unsharder."""
        unsharder = self._unsharder()
        return unsharder is not None and unsharder.unshard_outside_forward(self._unit)


def results(output: Any, module: nn.Module, first_node: int) -> Iterator[torch.Tensor]:
    """The tensors through which a backward can enter the forward of `module`: those in its `output`, however nested,
    and those that it left in attributes (the auxiliary losses of experts). first_node: torch's number of the autograd
    node that followed when the forward began. Older nodes are of an input that was passed on (Identity, a bias that all
    blocks share), which backward reaches only when it is in an earlier unit."""
    seen: set[int] = set()
    queue = [output, *(value for member in module.modules() for value in vars(member).values() if _may_hold(value))]
    while queue:
        value = queue.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.grad_fn is not None and value.grad_fn._sequence_nr() >= first_node:
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
    """The modules in `module` that have parameters of `flats` themselves, not only in a submodule."""
    members = {parameter for flat in flats for parameter in flat.members}
    for owner in module.modules():
        if any(parameter in members for parameter in owner._parameters.values() if parameter is not None):
            yield owner


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
