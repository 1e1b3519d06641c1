"""The parameters of stage 3 engines and the group and slot of each; partition_parameters.py shows them to scripts."""

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
    """Where a parameter is kept."""

    number: int
    """DeepSpeed's `ds_id`: the same on all ranks."""
    weak_flat: weakref.ref[FlatParamGroup] | None
    """None: the parameter is in no engine yet, or small and not trained, and so in no group."""
    slot: Slot | None
    waiting: bool = False
    """zero.Init has built it, and no engine has taken it yet."""

    @property
    def flat(self) -> FlatParamGroup | None:
        """The flat parameter group that has the parameter."""
        return self.weak_flat() if self.weak_flat is not None else None


_places: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> its Place."""
_present: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameters that wait for an engine and are on every rank for now: see init_gather.py."""
_numbers = itertools.count()


def place_of(parameter: nn.Parameter) -> Place | None:
    """The place of `parameter`; None if no stage 3 engine has it."""
    found: Place | None = _places.get(parameter)
    return found


def mark(
    parameter: nn.Parameter, flat: FlatParamGroup | None = None, slot: Slot | None = None, waiting: bool = False
) -> None:
    """Record that a stage 3 engine has `parameter` in `slot` of `flat`, or that zero.Init has made it, so that it waits
    for an engine."""
    if flat is None and parameter in _places:
        return  # a second module registers it
    _places[parameter] = Place(next(_numbers), weakref.ref(flat) if flat is not None else None, slot, waiting)


def unmark(parameter: nn.Parameter) -> None:
    """Forget `parameter`: its engine gives it up, or takes one that was waiting."""
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
