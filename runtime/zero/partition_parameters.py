"""What stage 3 hangs on a model's parameters, with DeepSpeed's names: scripts count parameters by `ds_numel`, and ask
`ds_status` whether one is whole. Those of an engine at stage 3 have these attributes, and those of a model that is
built under zero.Init and waits for its engine.

[Note: attributes that can't go stale]
Nothing is stored on a parameter: it must stay picklable, and its copies are no engine's. Nor is it of a class of its
own, for torch takes only plain parameters where it makes one from another. So nn.Parameter itself gets descriptors,
when the first parameter is marked: they look at the engine's state, and for a parameter that is not marked there is no
such attribute, as before.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from runtime.zero.flat import Flat
    from runtime.zero.layout import Slot


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    """The parameter is whole on this rank."""
    NOT_AVAILABLE = 2
    """This rank holds its shard of it, or under zero.Init nothing."""
    INFLIGHT = 3
    """It is being gathered."""


@dataclass(frozen=True)
class _Place:
    number: int
    weak_flat: weakref.ref[Flat] | None
    """None: small and not trained, whole on every rank; or in no engine yet."""
    slot: Slot | None
    waiting: bool = False
    """zero.Init has built it, and no engine has taken it yet."""

    @property
    def flat(self) -> Flat | None:
        return self.weak_flat() if self.weak_flat is not None else None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its place."""
_gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> what keeps it whole between all_gather() and partition()."""
_present: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Those that wait for an engine and are whole on every rank for now: see waiting.py."""
_numbers = itertools.count()


def _status(parameter: nn.Parameter, place: _Place) -> ZeroParamStatus:
    flat = place.flat
    if place.waiting:  # the same answer on every rank, though rank 0 has the values
        return ZeroParamStatus.AVAILABLE if parameter in _present else ZeroParamStatus.NOT_AVAILABLE
    if flat is None:
        return ZeroParamStatus.AVAILABLE
    if flat.gathered:
        return ZeroParamStatus.AVAILABLE
    return ZeroParamStatus.INFLIGHT if flat.arriving else ZeroParamStatus.NOT_AVAILABLE


def _persists(_parameter: nn.Parameter, place: _Place) -> bool:
    """Whether it is whole at all times: below stage3_param_persistence_threshold."""
    return place.flat is None or not place.flat.sharded


def _tensor(parameter: nn.Parameter, place: _Place) -> torch.Tensor:
    """(elements of it in this rank's shard,) in the precision it computes in; no element where the shard holds none of
    it, for shards are cut from whole units. All of a parameter that is whole."""
    if place.flat is None or place.slot is None or not place.flat.sharded:
        return parameter.detach().reshape(-1)
    low, high = place.flat.own_part(place.slot)
    return place.flat.own[low:high]


def _all_gather(parameter: nn.Parameter, _place: _Place) -> Callable[..., None]:
    def all_gather(param_list: Sequence[nn.Parameter] | None = None, async_op: bool = False) -> None:
        """It (or `param_list`) is whole until `partition()`; every rank must call both. async_op: accepted; it is there
        on return."""
        from runtime.zero.whole import GatheredParameters

        for each in param_list or [parameter]:
            if each not in _gathered:
                context: AbstractContextManager[None] = GatheredParameters(each)
                context.__enter__()
                _gathered[each] = context

    return all_gather


def _partition(parameter: nn.Parameter, _place: _Place) -> Callable[..., None]:
    def partition(
        param_list: Sequence[nn.Parameter] | None = None, hierarchy: int = 0, has_been_updated: bool = False
    ) -> None:
        """The end of `all_gather()`. has_been_updated: every rank has changed it alike, and keeps its shard of that."""
        from runtime.zero.whole import take

        for each in param_list or [parameter]:
            if has_been_updated:
                take(each)
            context: AbstractContextManager[None] | None = _gathered.pop(each, None)
            if context is not None:
                context.__exit__(None, None, None)

    return partition


_READ: dict[str, Callable[[nn.Parameter, _Place], Any]] = {
    "ds_id": lambda _parameter, place: place.number,  # the same on all ranks
    "ds_shape": lambda parameter, _place: parameter.shape,
    "ds_numel": lambda parameter, _place: parameter.numel(),
    "ds_persist": _persists,
    "ds_status": _status,
    "ds_tensor": _tensor,
    "all_gather": _all_gather,
    "partition": _partition,
}


class _Attribute:
    """See [Note: attributes that can't go stale]. What a script sets on a parameter itself comes first."""

    def __init__(self, name: str) -> None:
        self._name, self._read = name, _READ[name]

    def __get__(self, parameter: nn.Parameter | None, kind: type[Any]) -> Any:
        if parameter is None:
            return self
        place: _Place | None = _places.get(parameter)
        if place is None:  # hasattr() must say that there is none
            raise AttributeError(f"this {kind.__name__} is in no engine at stage 3, so it has no {self._name}")
        return self._read(parameter, place)


def mark(parameter: nn.Parameter, flat: Flat | None = None, slot: Slot | None = None, waiting: bool = False) -> None:
    """An engine at stage 3 holds `parameter`, or zero.Init has made it for one, and it is waiting."""
    if flat is None and parameter in _places:
        return  # a second module takes it
    for name in _READ:
        if name not in vars(nn.Parameter):
            setattr(nn.Parameter, name, _Attribute(name))
    _places[parameter] = _Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot, waiting)


def unmark(parameter: nn.Parameter) -> None:
    """The engine lets go of it, or takes one that was waiting."""
    _places.pop(parameter, None)


def is_waiting(parameter: torch.Tensor) -> bool:
    """Whether zero.Init has built it and no engine has taken it yet; the same on every rank."""
    place: _Place | None = _places.get(parameter)
    return place is not None and place.waiting


def set_present(parameter: nn.Parameter, whole: bool) -> None:
    """Of one that is waiting: whether every rank has its values now."""
    if whole:
        _present[parameter] = True
    else:
        _present.pop(parameter, None)


def swap(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """All that two parameters are, but for which object is which; `parameter` keeps its place here. (torch swaps
    nothing that is in a weak dictionary.) Raises RuntimeError while a graph refers to one of them."""
    place = _places.pop(parameter)
    try:
        torch.utils.swap_tensors(parameter, other)
    finally:
        _places[parameter] = place


def __getattr__(name: str) -> Any:
    if name in ("GatheredParameters", "Init"):
        import runtime.zero

        return getattr(runtime.zero, name)
    raise AttributeError(f"module 'runtime.zero.partition_parameters' has no attribute {name!r}")
