"""The parameters of stage 3 engines and the group and slot of each; partition_parameters.py shows them to scripts."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from runtime.plan.layout import Slot
from runtime.zero.flat import FlatParamGroup


@dataclass(frozen=True)
class Place:
    """Where a parameter is kept."""

    number: int
    """DeepSpeed's `ds_id`: the same on all ranks."""
    weak_flat: weakref.ref[FlatParamGroup] | None
    """None: the parameter is in no engine yet, or small and not trained, and so in no group."""
    slot: Slot | None

    @property
    def flat(self) -> FlatParamGroup | None:
        """The flat parameter group that has the parameter."""
        return self.weak_flat() if self.weak_flat is not None else None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its Place."""
_numbers = itertools.count()


def place_of(parameter: nn.Parameter) -> Place | None:
    """The place of `parameter`; None if no stage 3 engine has it."""
    found: Place | None = _places.get(parameter)
    return found


def mark(parameter: nn.Parameter, flat: FlatParamGroup | None = None, slot: Slot | None = None) -> None:
    """Record that a stage 3 engine has `parameter` in `slot` of `flat`, or that zero.Init has made it (no `flat`)."""
    if flat is None and parameter in _places:
        return  # a second module registers it
    _places[parameter] = Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot)


def unmark(parameter: nn.Parameter) -> None:
    """Forget `parameter`: its engine gives it up."""
    _places.pop(parameter, None)
