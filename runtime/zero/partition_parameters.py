"""What stage 3 hangs on a model's parameters, with DeepSpeed's names: scripts count parameters by `ds_numel`, and ask
`ds_status` whether one is whole.

Nothing is stored on a parameter that could go stale, and copies and pickles of one are plain parameters: an engine
makes its parameters instances of `ZeroParameter`, whose properties look at the engine's state, and plain ones again
when it lets go.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from runtime.zero.flat import Flat
from runtime.zero.layout import Slot


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    """The parameter is whole on this rank."""
    NOT_AVAILABLE = 2
    """This rank holds its shard of it."""
    INFLIGHT = 3
    """It is being gathered."""


@dataclass(frozen=True)
class _Place:
    number: int
    flat: weakref.ref[Flat] | None
    """None: not trained and small, whole on every rank."""
    slot: Slot | None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its place."""
_gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> what keeps it whole between all_gather() and partition()."""
_numbers = itertools.count()


class ZeroParameter(nn.Parameter):
    """A parameter of an engine at stage 3."""

    @property
    def ds_id(self) -> int:
        """A number of its own, the same on all ranks."""
        return _place_of(self, "ds_id").number

    @property
    def ds_shape(self) -> torch.Size:
        """Of the whole parameter, as `shape` is at all times."""
        _place_of(self, "ds_shape")
        return self.shape

    @property
    def ds_numel(self) -> int:
        """Of the whole parameter, as `numel()` is at all times."""
        _place_of(self, "ds_numel")
        return self.numel()

    @property
    def ds_persist(self) -> bool:
        """Whether it is whole at all times: below stage3_param_persistence_threshold."""
        flat = _flat_of(self, "ds_persist")
        return flat is None or not flat.sharded

    @property
    def ds_status(self) -> ZeroParamStatus:
        flat = _flat_of(self, "ds_status")
        if flat is None or flat.gathered:
            return ZeroParamStatus.AVAILABLE
        return ZeroParamStatus.INFLIGHT if flat.arriving else ZeroParamStatus.NOT_AVAILABLE

    @property
    def ds_tensor(self) -> torch.Tensor:
        """(elements of it in this rank's shard,) in the precision it computes in; no element where the shard holds none
        of it, for shards are cut from whole units. All of a parameter that is whole at all times."""
        place, flat = _place_of(self, "ds_tensor"), _flat_of(self, "ds_tensor")
        if flat is None or place.slot is None or not flat.sharded:
            return self.detach().view(-1)
        low, high = flat.own_part(place.slot)
        return flat.own[low:high]

    def all_gather(self, param_list: Sequence[nn.Parameter] | None = None, async_op: bool = False) -> None:
        """It (or `param_list`) is whole until `partition()`; every rank must call both. async_op: accepted; it is there
        on return."""
        from runtime.zero.whole import GatheredParameters

        for parameter in param_list or [self]:
            if parameter not in _gathered:
                context: AbstractContextManager[None] = GatheredParameters(parameter)
                context.__enter__()
                _gathered[parameter] = context

    def partition(
        self, param_list: Sequence[nn.Parameter] | None = None, hierarchy: int = 0, has_been_updated: bool = False
    ) -> None:
        """The end of `all_gather()`. has_been_updated: every rank has changed it alike, and keeps its shard of that."""
        from runtime.zero.whole import take

        for parameter in param_list or [self]:
            if has_been_updated:
                take(parameter)
            context: AbstractContextManager[None] | None = _gathered.pop(parameter, None)
            if context is not None:
                context.__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        copied: Any = super().__deepcopy__(memo)
        copied.__class__ = nn.Parameter
        return copied  # type: ignore[no-any-return]


def _place_of(parameter: nn.Parameter, name: str) -> _Place:
    place: _Place | None = _places.get(parameter)
    if place is None:  # hasattr() must say that there is none
        raise AttributeError(f"this parameter is in no engine at stage 3, so it has no {name}")
    return place


def _flat_of(parameter: nn.Parameter, name: str) -> Flat | None:
    place = _place_of(parameter, name)
    return place.flat() if place.flat is not None else None


def mark(parameter: nn.Parameter, flat: Flat | None = None, slot: Slot | None = None) -> None:
    """An engine at stage 3 holds `parameter`. Of a class of its own (quantized weights), it keeps that."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = ZeroParameter
    _places[parameter] = _Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot)


def unmark(parameter: nn.Parameter) -> None:
    """The engine lets go of it."""
    _places.pop(parameter, None)
    if type(parameter) is ZeroParameter:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]


def __getattr__(name: str) -> Any:
    if name in ("GatheredParameters", "Init"):
        import runtime.zero

        return getattr(runtime.zero, name)
    raise AttributeError(f"module 'runtime.zero.partition_parameters' has no attribute {name!r}")
