"""The whole model for those who ask: state_dict, load_state_dict and GatheredParameters, at every stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from runtime.comm import Comm
from runtime.zero.flat import Flat
from runtime.zero.gathering import Gathering
from runtime.zero.unit import Unit

_homes: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> (weak WholeModel, index of its unit there): what is strong here would keep the parameter and so all of
its engine alive for ever. Not an attribute of the parameter, which must stay picklable."""


class WholeModel:
    """Makes a model's own state_dict() and load_state_dict() right while an engine holds its parameters.

    At stage 3 both gather unit by unit, so every rank must call them; state_dict() then hands out copies in host
    memory, for the whole model may not fit a device.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[Unit],
        gathering: Gathering,
        comm: Comm,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """settle: returns when no update is under way."""
        self.units, self.gathering, self.comm, self.settle = list(units), gathering, comm, settle
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._names = names
        for index, unit in enumerate(self.units):
            for flat in (*unit.flats, *unit.frozen):
                for parameter in flat.members:
                    _homes[parameter] = (weakref.ref(self), index)
        weak = weakref.ref(self)

        def after_state_dict(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
            if (whole := weak()) is not None:
                whole.settle()
                whole._fill(state, prefix)

        def before_load(*_arguments: Any) -> None:
            if (whole := weak()) is not None:
                whole.settle()
                whole._loading = whole.gathering.everything()
                whole._loading.__enter__()

        def after_load(*_arguments: Any) -> None:
            if (whole := weak()) is not None:
                whole._take(whole.units)
                whole._loading.__exit__(None, None, None)

        self._hooks = [
            module.register_state_dict_post_hook(after_state_dict),
            module.register_load_state_dict_pre_hook(before_load),
            module.register_load_state_dict_post_hook(after_load),
        ]

    _loading: Any = None

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _fill(self, state: dict[str, Any], prefix: str) -> None:
        for unit in self.gathering.units:
            with self.gathering.everything([unit]):
                for parameter in (parameter for flat in unit.sharded for parameter in flat.members):
                    copy = parameter.detach().to("cpu", copy=True)
                    for name in self._names[id(parameter)]:
                        if prefix + name in state:
                            state[prefix + name] = copy

    def _take(self, units: Iterable[Unit]) -> None:
        for unit in units:
            for flat in (*unit.flats, *unit.frozen):
                flat.parameters_to_own()

    @contextmanager
    def gathered(self, units: list[Unit], modifier_rank: int | None) -> Iterator[None]:
        self.settle()
        with self.gathering.everything(units):
            yield
            if modifier_rank is not None:
                for flat in (flat for unit in units for flat in _flats(unit)):
                    self.comm.broadcast_bytes(flat.whole, modifier_rank)
                self._take(units)


def _flats(unit: Unit) -> list[Flat]:
    return [*unit.flats, *unit.frozen]


@contextmanager
def GatheredParameters(  # noqa: N802: DeepSpeed's name
    params: nn.Parameter | Iterable[nn.Parameter] | nn.Module,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Inside, `params` are whole on every rank; every rank must enter. Other parameters of their units are, too.

    modifier_rank: what this rank changed in place inside is everybody's afterwards, masters included; without it,
    changes at stage 3 are lost. fwd_module: accepted and not needed. Parameters that no engine holds are left alone.
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    homes: dict[int, tuple[WholeModel, list[Unit]]] = {}
    for parameter in listed if enabled else []:
        weak, index = _homes.get(parameter, (lambda: None, 0))
        if (whole := weak()) is not None:
            unit, units = whole.units[index], homes.setdefault(id(whole), (whole, []))[1]
            units += [unit] * (not any(unit is other for other in units))
    with ExitStack() as stack:
        for whole, units in homes.values():
            stack.enter_context(whole.gathered(units, modifier_rank))
        yield
