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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from runtime.deepspeed_paths import attribute_of
from runtime.zero.full import GatheredParameters, take
from runtime.zero.places import Place, is_present, place_of


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    """The parameter is whole on this rank."""
    NOT_AVAILABLE = 2
    """This rank holds its shard of it, or under zero.Init nothing."""
    INFLIGHT = 3
    """It is being gathered."""


_gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> what keeps it whole between all_gather() and partition()."""


def _status(parameter: nn.Parameter, place: Place) -> ZeroParamStatus:
    flat = place.flat
    if place.waiting:  # the same answer on every rank, though rank 0 has the values
        return ZeroParamStatus.AVAILABLE if is_present(parameter) else ZeroParamStatus.NOT_AVAILABLE
    if flat is None:
        return ZeroParamStatus.AVAILABLE
    if flat.is_unsharded:
        return ZeroParamStatus.AVAILABLE
    return ZeroParamStatus.INFLIGHT if flat.is_unsharding else ZeroParamStatus.NOT_AVAILABLE


def _persists(_parameter: nn.Parameter, place: Place) -> bool:
    """Whether it is whole at all times: below stage3_param_persistence_threshold."""
    return place.flat is None or not place.flat.sharded


def _tensor(parameter: nn.Parameter, place: Place) -> torch.Tensor:
    """(elements of it in this rank's shard,) in the precision it computes in; no element where the shard holds none of
    it, for shards are cut from whole units. All of a parameter that is whole."""
    if place.flat is None or place.slot is None or not place.flat.sharded:
        return parameter.detach().reshape(-1)
    low, high = place.flat.own_part(place.slot)
    return place.flat.own[low:high]


def _all_gather(parameter: nn.Parameter, _place: Place) -> Callable[..., None]:
    def all_gather(param_list: Sequence[nn.Parameter] | None = None, async_op: bool = False) -> None:
        """It (or `param_list`) is whole until `partition()`; every rank must call both. async_op: accepted; it is there
        on return."""
        for each in param_list or [parameter]:
            if each not in _gathered:
                context: AbstractContextManager[None] = GatheredParameters(each)
                context.__enter__()
                _gathered[each] = context

    return all_gather


def _partition(parameter: nn.Parameter, _place: Place) -> Callable[..., None]:
    def partition(
        param_list: Sequence[nn.Parameter] | None = None, hierarchy: int = 0, has_been_updated: bool = False
    ) -> None:
        """The end of `all_gather()`. has_been_updated: every rank has changed it alike, and keeps its shard of that."""
        for each in param_list or [parameter]:
            if has_been_updated:
                take(each)
            context: AbstractContextManager[None] | None = _gathered.pop(each, None)
            if context is not None:
                context.__exit__(None, None, None)

    return partition


_READ: dict[str, Callable[[nn.Parameter, Place], Any]] = {
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
        place = place_of(parameter)
        if place is None:  # hasattr() must say that there is none
            raise AttributeError(f"this {kind.__name__} is in no engine at stage 3, so it has no {self._name}")
        return self._read(parameter, place)


def install_attributes() -> None:
    """From now on nn.Parameter has them. See [Note: attributes that can't go stale]."""
    for name in _READ:
        if name not in vars(nn.Parameter):
            setattr(nn.Parameter, name, _Attribute(name))


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.zero", name, {"Init": "init"})
