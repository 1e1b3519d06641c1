"""Which parameters stage 3 holds, and where each of them is. (What scripts see of it: partition_parameters.py)"""

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
    number: int
    weak_flat: weakref.ref[FlatParamGroup] | None
    """None: small and not trained, whole on every rank; or in no engine yet."""
    slot: Slot | None

    @property
    def flat(self) -> FlatParamGroup | None:
        return self.weak_flat() if self.weak_flat is not None else None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its place."""
_numbers = itertools.count()


def place_of(parameter: nn.Parameter) -> Place | None:
    """None for a parameter that is not marked."""
    found: Place | None = _places.get(parameter)
    return found


def mark(parameter: nn.Parameter, flat: FlatParamGroup | None = None, slot: Slot | None = None) -> None:
    """An engine at stage 3 holds `parameter`, or zero.Init has made it for one."""
    if flat is None and parameter in _places:
        return  # a second module takes it
    _places[parameter] = Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot)


def unmark(parameter: nn.Parameter) -> None:
    """The engine lets go of it."""
    _places.pop(parameter, None)
