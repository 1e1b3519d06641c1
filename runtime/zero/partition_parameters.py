"""DeepSpeed's attributes of parameters at stage 3: scripts count parameters by `ds_numel` and read `ds_status` to see
whether one is unsharded. Parameters of a stage 3 engine have them, and those of a model built under zero.Init.

[Note: attributes that can't go stale]
Nothing is stored on a parameter, because it must stay picklable and its copies belong to no engine. Nor can it be of a
class of its own, because torch makes parameters only from plain ones. So nn.Parameter itself gets descriptors that read
the engine's state. For parameters of no engine they raise AttributeError, as if they did not exist.
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
from runtime.zero.full import GatheredParameters, commit_changes
from runtime.zero.param_places import Place, is_present, place_of


class ZeroParamStatus(Enum):
    """Whether a parameter is unsharded, as `ds_status` says it."""

    AVAILABLE = 1
    """The parameter is unsharded."""
    NOT_AVAILABLE = 2
    """This rank has only its shard of the parameter, or, under zero.Init, nothing."""
    INFLIGHT = 3
    """The parameter's all-gather is under way."""


_gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> the context that keeps it unsharded between all_gather() and partition()."""


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
    """Whether it is unsharded at all times: smaller than stage3_param_persistence_threshold."""
    return place.flat is None or not place.flat.sharded


def _tensor(parameter: nn.Parameter, place: Place) -> torch.Tensor:
    """(elements,) this rank's shard of the parameter in the compute dtype. It may be empty, because it is the unit that
    is sharded and not each parameter. All of a parameter that is never sharded."""
    if place.flat is None or place.slot is None or not place.flat.sharded:
        return parameter.detach().reshape(-1)
    low, high = place.flat.shard_bounds(place.slot)
    return place.flat.param_shard[low:high]


def _all_gather(parameter: nn.Parameter, _place: Place) -> Callable[..., None]:
    def all_gather(param_list: Sequence[nn.Parameter] | None = None, async_op: bool = False) -> None:
        """Unshard the parameter, or `param_list`, until `partition()`. Every rank must call both. async_op: accepted;
        the all-gather is always complete on return."""
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
        """Reshard what `all_gather()` unsharded. has_been_updated: whether to keep changes, which every rank has made
        alike."""
        for each in param_list or [parameter]:
            if has_been_updated:
                commit_changes(each)
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
    """One of DeepSpeed's attributes: see [Note: attributes that can't go stale]. It has no __set__, so an attribute
    that a script sets on a parameter takes precedence."""

    def __init__(self, name: str) -> None:
        self._name, self._read = name, _READ[name]

    def __get__(self, parameter: nn.Parameter | None, kind: type[Any]) -> Any:
        if parameter is None:
            return self
        place = place_of(parameter)
        if place is None:  # hasattr() must say that there is none
            raise AttributeError(f"{kind.__name__} has no {self._name}: it belongs to no stage 3 engine")
        return self._read(parameter, place)


def install_attributes() -> None:
    """Add DeepSpeed's attributes to nn.Parameter. See [Note: attributes that can't go stale]."""
    for name in _READ:
        if name not in vars(nn.Parameter):
            setattr(nn.Parameter, name, _Attribute(name))


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.zero", name, {"Init": "init"})
