"""Which parameters stage 3 holds, and where each of them is. (What scripts see of it: partition_parameters.py)"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import torch
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
    waiting: bool = False
    """zero.Init has built it, and no engine has taken it yet."""

    @property
    def flat(self) -> FlatParamGroup | None:
        return self.weak_flat() if self.weak_flat is not None else None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its place."""
_present: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that wait for an engine and are whole on every rank for now: see waiting.py."""
_numbers = itertools.count()


def place_of(parameter: nn.Parameter) -> Place | None:
    """None for a parameter that is not marked."""
    found: Place | None = _places.get(parameter)
    return found


def mark(
    parameter: nn.Parameter, flat: FlatParamGroup | None = None, slot: Slot | None = None, waiting: bool = False
) -> None:
    """An engine at stage 3 holds `parameter`, or zero.Init has made it for one, and it is waiting."""
    if flat is None and parameter in _places:
        return  # a second module takes it
    _places[parameter] = Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot, waiting)


def unmark(parameter: nn.Parameter) -> None:
    """The engine lets go of `parameter`, or takes one that was waiting."""
    _places.pop(parameter, None)


def is_waiting(parameter: nn.Parameter) -> bool:
    """Whether zero.Init has built it and no engine has taken it yet; the same on every rank."""
    place = place_of(parameter)
    return place is not None and place.waiting


def is_present(parameter: nn.Parameter) -> bool:
    """Of a parameter that is waiting: whether every rank has its values now."""
    return parameter in _present


def set_present(parameter: nn.Parameter, whole: bool) -> None:
    """Of a parameter that is waiting: whether every rank has its values from now on."""
    if whole:
        _present[parameter] = True
    else:
        _present.pop(parameter, None)


def swap(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Swap all that two parameters are, but for which object is which; `parameter` keeps its place here. (torch swaps
    nothing that is in a weak dictionary.) Raises RuntimeError while a graph refers to one of them."""
    place = _places.pop(parameter)
    try:
        torch.utils.swap_tensors(parameter, other)
    finally:
        _places[parameter] = place
