"""The full model at every stage: state_dict, load_state_dict and GatheredParameters."""

from __future__ import annotations

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
from runtime.zero.places import is_waiting, mark, unmark
from runtime.zero.unit import Unit
from runtime.zero.unshard import Unsharder, owners
from runtime.zero.waiting import present

_holders: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> (weak FullModel, index of its unit there): what is strong here would keep the parameter and so all of
its engine alive for ever. Not an attribute of the parameter, which must stay picklable."""


class FullModel:
    """Makes a model's own state_dict() and load_state_dict() right while an engine holds its parameters.

    At stage 3 both gather unit by unit, so every rank must call them; state_dict() then hands out copies in host
    memory, for the whole model may not fit a device. Those of modules inside work the same way.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        unsharder: Unsharder,
        comm: Comm,
        settle: Callable[[], None] = lambda: None,
        before_change: Callable[[], None] = lambda: None,
    ) -> None:
        """settle: returns when no update is under way. before_change: when masters and own shards may be written."""
        self.module, self.units, self.unsharder = module, list(units), unsharder
        self.comm, self.settle = comm, settle
        self._before_change = before_change
        for index, unit in enumerate(self.units):
            for flat in _flats(unit):
                for slot, parameter in zip(flat.layout.slots, flat.members, strict=True):
                    _holders[parameter] = (weakref.ref(self), index)
                    if flat.policy.shards_parameters:
                        mark(parameter, flat, slot)
        self.keeps = True
        self._loads: list[Unit] = []
        self._loading = ExitStack()
        self._depth = 0
        """state_dict() and load_state_dict() call the hooks of every module below the one that was asked."""
        self._hooks: list[Any] = []
        for member in {module, *(o for unit in self.units for o in owners(module, _flats(unit)))}:
            self._hooks += [
                member.register_state_dict_pre_hook(EngineHook(self, FullModel._before_state_dict)),
                member.register_state_dict_post_hook(EngineHook(self, FullModel._after_state_dict)),
                member.register_load_state_dict_pre_hook(EngineHook(self, FullModel._before_load)),
                member.register_load_state_dict_post_hook(EngineHook(self, FullModel._after_load)),
            ]

    def detach(self) -> None:
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
                    copy = parameter.detach().to("cpu", copy=True) if self.keeps else None
                    for name in names[id(parameter)]:
                        if name in state:
                            state[name] = copy

    def _before_load(self, module: nn.Module, *_given: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self.settle()
        below = {id(parameter) for parameter in module.parameters()}
        self._loads = [unit for unit in self.units if below & {id(p) for flat in _flats(unit) for p in flat.members}]
        self._loading.enter_context(self.unsharder.unsharded(self._loads))

    def _after_load(self, *_given: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.take(self._loads)
            self._loading.close()

    @contextmanager
    def without_values(self, needed: bool) -> Iterator[None]:
        """Inside, state_dict() takes part in gathering and keeps nothing of it, unless `needed`: for ranks that have no
        use for the model, and no memory."""
        self.keeps = needed
        try:
            yield
        finally:
            self.keeps = True

    def take(self, units: Iterable[Unit]) -> None:
        """What the gathered parameters of `units` hold is theirs from now on, masters included."""
        self._before_change()
        for unit in units:
            for flat in (*unit.flats, *unit.frozen):
                flat.parameters_to_own()

    @contextmanager
    def gathered(self, units: list[Unit], modifier_rank: int | None) -> Iterator[None]:
        self.settle()
        with self.unsharder.unsharded(units):
            yield
            if modifier_rank is not None:
                for flat in (flat for unit in units for flat in _flats(unit)):
                    self.comm.broadcast_bytes(flat.whole, modifier_rank)
                self.take(units)


def _flats(unit: Unit) -> list[FlatParamGroup]:
    return [*unit.flats, *unit.frozen]


def holder_of(parameter: torch.Tensor | None) -> tuple[FullModel, Unit] | None:
    """The model that holds `parameter`, and the unit in which it is; None where no engine does."""
    weak, index = _holders.get(parameter, (lambda: None, 0)) if parameter is not None else (lambda: None, 0)
    whole: FullModel | None = weak()
    return (whole, whole.units[index]) if whole is not None else None


def take(parameter: nn.Parameter) -> None:
    """What `parameter` and its unit, being whole, hold is theirs from now on: every rank has changed them alike."""
    if (home := holder_of(parameter)) is not None:
        whole, unit = home
        whole.take([unit])


@contextmanager
def GatheredParameters(  # noqa: N802: DeepSpeed's name
    params: nn.Parameter | Iterable[nn.Parameter | None] | nn.Module,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Inside, `params` are whole on every rank; every rank must enter. Other parameters of their units are, too.

    modifier_rank: what this rank changed in place inside is everybody's afterwards, masters included; without it,
    changes at stage 3 are lost. fwd_module: accepted and not needed. Of what zero.Init has built and no engine has
    taken yet, every rank gets rank 0's values. Other parameters that no engine holds are left alone, and so are None
    (the bias of a layer without one) and tensors that are no parameters.
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    holders: dict[int, tuple[FullModel, list[Unit]]] = {}
    for parameter in listed if enabled else []:
        if (home := holder_of(parameter)) is not None:
            whole, unit = home
            units = holders.setdefault(id(whole), (whole, []))[1]
            units += [unit] * (not any(unit is other for other in units))
    waiting = [each for each in listed if enabled and isinstance(each, nn.Parameter) and is_waiting(each)]
    with ExitStack() as stack:
        if waiting:
            stack.enter_context(present(list(dict.fromkeys(waiting)), modifier_rank))
        for whole, units in holders.values():
            stack.enter_context(whole.gathered(units, modifier_rank))
        yield
