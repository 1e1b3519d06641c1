"""The full model at every stage: state_dict, load_state_dict and GatheredParameters."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from runtime.comm import Comm
from runtime.zero.flat import FlatParamGroup
from runtime.zero.hooks import EngineHook
from runtime.zero.init_gather import present
from runtime.zero.param_places import is_waiting, mark, unmark
from runtime.zero.unit import Unit
from runtime.zero.unshard import Unsharder, owners

log = logging.getLogger("runtime.engine")
_full_models: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> (weak reference to its FullModel, index of its unit). A strong reference would keep the engine alive for
ever; an attribute of the parameter would be pickled with it."""
_whole_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Frozen parameter that is in no unit, because it is not sharded -> weak reference to its FullModel."""


class FullModel:
    """Makes state_dict() and load_state_dict() of a model and its modules work with full parameters at every stage.

    At stage 3 both unshard one unit after the other, so every rank must call them, and state_dict() returns copies in
    host memory, because the full model may not fit on a device.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        unsharder: Unsharder,
        comm: Comm,
        settle: Callable[[], None] = lambda: None,
        before_change: Callable[[], None] = lambda: None,
        frozen: Sequence[nn.Parameter] = (),
    ) -> None:
        """settle: waits until no update is under way. before_change: waits until masters and shards may be written.
        frozen: frozen parameters that are in no unit."""
        self.module, self.units, self.unsharder = module, list(units), unsharder
        self.comm, self.settle = comm, settle
        self._before_change = before_change
        for index, unit in enumerate(self.units):
            for flat in _flats(unit):
                for slot, parameter in zip(flat.layout.slots, flat.members, strict=True):
                    _full_models[parameter] = (weakref.ref(self), index)
                    if flat.policy.shards_parameters:
                        mark(parameter, flat, slot)
        _whole_frozen.update((parameter, weakref.ref(self)) for parameter in frozen)
        self._writes_seen: dict[nn.Parameter, int] = {}
        """Version counters at the beginning of a GatheredParameters that keeps no changes."""
        self._warned_of_lost_writes = False
        self._keeps_values = True
        self._loading_units: list[Unit] = []
        self._loading = ExitStack()
        self._depth = 0
        """How many calls of the hooks are nested: state_dict() and load_state_dict() call those of every submodule."""
        self._hooks: list[Any] = []
        for member in {module, *(o for unit in self.units for o in owners(module, _flats(unit)))}:
            self._hooks += [
                member.register_state_dict_pre_hook(EngineHook(self, FullModel._before_state_dict)),
                member.register_state_dict_post_hook(EngineHook(self, FullModel._after_state_dict)),
                member.register_load_state_dict_pre_hook(EngineHook(self, FullModel._before_load)),
                member.register_load_state_dict_post_hook(EngineHook(self, FullModel._after_load)),
            ]

    def detach(self) -> None:
        """Remove the hooks and the parameters' attributes: the engine gives the model up."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in (p for unit in self.units for flat in _flats(unit) for p in flat.members):
            unmark(parameter)

    def _before_state_dict(self, *_given: Any) -> None:
        self._depth += 1

    def _after_state_dict(self, module: nn.Module, state: dict[str, Any], prefix: str, *_given: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        self.settle()
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(prefix + name)
        for unit in self.unsharder.units:
            members = [p for flat in unit.sharded for p in flat.members if id(p) in names]
            if not members:
                continue
            with self.unsharder.unsharded([unit]):
                for parameter in members:
                    copy = parameter.detach().to("cpu", copy=True) if self._keeps_values else None
                    for name in names[id(parameter)]:
                        if name in state:
                            state[name] = copy

    def _before_load(self, module: nn.Module, *_given: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self.settle()
        below = {id(parameter) for parameter in module.parameters()}
        self._loading_units = [
            unit for unit in self.units if below & {id(p) for flat in _flats(unit) for p in flat.members}
        ]
        self._loading.enter_context(self.unsharder.unsharded(self._loading_units))

    def _after_load(self, *_given: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.commit_changes(self._loading_units)
            self._loading.close()

    @contextmanager
    def without_values(self, needed: bool) -> Iterator[None]:
        """Inside, state_dict() takes part in the all-gathers but, unless `needed`, returns no values: for ranks that
        need no copy of the full model."""
        self._keeps_values = needed
        try:
            yield
        finally:
            self._keeps_values = True

    def commit_changes(self, units: Iterable[Unit]) -> None:
        """Copy what was written into the unsharded parameters of `units` to their shards and masters."""
        self._before_change()
        for unit in units:
            for flat in (*unit.flats, *unit.frozen):
                flat.parameters_to_masters()
                for parameter in flat.members:
                    self._writes_seen.pop(parameter, None)  # kept, so there is nothing to warn of

    @contextmanager
    def unsharded(
        self, units: list[Unit], modifier_rank: int | None, frozen: Sequence[nn.Parameter] = ()
    ) -> Iterator[None]:
        """Inside, `units` are unsharded. What `modifier_rank` changed in place, in these and in the `frozen` parameters
        of no unit, is broadcast and kept on leaving; None: changes are not kept."""
        self.settle()
        with self.unsharder.unsharded(units):
            watched = self._watch_writes(units) if modifier_rank is None else []
            yield
            self._warn_of_lost_writes(watched)
            if modifier_rank is not None:
                for flat in (flat for unit in units for flat in _flats(unit)):
                    self.comm.broadcast_bytes(flat.full_param, modifier_rank)
                for parameter in frozen:
                    self.comm.broadcast_bytes(parameter.data, modifier_rank)
                self.commit_changes(units)

    def _watch_writes(self, units: Sequence[Unit]) -> list[tuple[str, nn.Parameter]]:
        """Note the version counters of the sharded parameters, and return these with their names. A context that stands
        around another one has noted them already."""
        if self._warned_of_lost_writes:
            return []
        found = [
            (slot.name, parameter)
            for unit in units
            for flat in unit.sharded
            for slot, parameter in zip(flat.layout.slots, flat.members, strict=True)
            if parameter not in self._writes_seen
        ]
        self._writes_seen.update((parameter, parameter._version) for _, parameter in found)
        return found

    def _warn_of_lost_writes(self, watched: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Say once which parameters a script has changed in place where nobody keeps the change. Not an error: scripts
        merge adapters for a while."""
        lost = [
            name
            for name, parameter in watched
            if self._writes_seen.pop(parameter, parameter._version) != parameter._version
        ]
        if lost and not self._warned_of_lost_writes:
            self._warned_of_lost_writes = True
            others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
            log.warning(
                "GatheredParameters: %s%s changed in place inside it, and at stage 3 the change is lost on leaving. To "
                "keep it, change the same parameters on every rank and pass modifier_rank=0",
                lost[0],
                others,
            )


def _flats(unit: Unit) -> list[FlatParamGroup]:
    return [*unit.flats, *unit.frozen]


def full_model_of(parameter: torch.Tensor | None) -> tuple[FullModel, Unit] | None:
    """The FullModel and the unit that have `parameter`; None if no engine has it."""
    weak, index = _full_models.get(parameter, (lambda: None, 0)) if parameter is not None else (lambda: None, 0)
    full: FullModel | None = weak()
    return (full, full.units[index]) if full is not None else None


def commit_changes(parameter: nn.Parameter) -> None:
    """Copy the unsharded values of `parameter` and its unit, which every rank has changed alike, to shards and
    masters."""
    if (found := full_model_of(parameter)) is not None:
        full, unit = found
        full.commit_changes([unit])


@contextmanager
def GatheredParameters(
    params: nn.Parameter | Iterable[nn.Parameter | None] | nn.Module,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Inside, `params` are unsharded on every rank, with the other parameters of their units. Every rank must enter.

    modifier_rank: the rank whose in-place changes all ranks keep afterwards, masters included; without it, changes at
    stage 3 are lost. fwd_module: accepted and not needed. Of parameters that zero.Init has built and no engine has
    taken yet, every rank gets rank 0's values. Other parameters of no engine, None (the bias of a layer without one)
    and tensors that are not parameters are ignored.
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    holders: dict[FullModel, tuple[list[Unit], list[nn.Parameter]]] = {}
    for parameter in listed if enabled else []:
        if (found := full_model_of(parameter)) is not None:
            full, unit = found
            units, _ = holders.setdefault(full, ([], []))
            units += [unit] * (not any(unit is other for other in units))
        elif (
            isinstance(parameter, nn.Parameter) and (owner := _whole_frozen.get(parameter, lambda: None)()) is not None
        ):
            holders.setdefault(owner, ([], []))[1].append(parameter)
    waiting = [each for each in listed if enabled and isinstance(each, nn.Parameter) and is_waiting(each)]
    with ExitStack() as stack:
        if waiting:
            stack.enter_context(present(list(dict.fromkeys(waiting)), modifier_rank))
        for full, (units, frozen) in holders.items():
            stack.enter_context(full.unsharded(units, modifier_rank, frozen))
        yield
