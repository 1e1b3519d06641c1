"""Grids of parameters, of which a selection runs always and the rest with the slow tests.

    @pytest.mark.parametrize(("world", "stage", "clip"), pairwise([1, 2, 3], range(4), [0.0, 0.5]))

In the selection every two values of different axes meet at least once: what goes wrong with one value, or with two
together, is found without the other combinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any]) -> list[Any]:
    """The product of `axes` as parameters, all of them marked slow but for the selection."""
    values = [list(axis) for axis in axes]
    indices = list(itertools.product(*(range(len(axis)) for axis in values)))
    chosen = covering(indices)
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(values, index, strict=True)),
            marks=() if index in chosen else pytest.mark.slow,
        )
        for index in indices
    ]


def covering(candidates: Iterable[Any], values: Callable[[Any], Iterable[Any]] = iter) -> list[Any]:
    """A few of the candidates in which every two values that occur together in any of them do. values: of one
    candidate, in an order that is the same for all."""
    left = [(candidate, set(itertools.combinations(enumerate(values(candidate)), 2))) for candidate in candidates]
    missing = set().union(*(pairs for _, pairs in left))
    chosen = []
    while missing:
        best, pairs = max(left, key=lambda item: len(item[1] & missing))
        chosen.append(best)
        missing -= pairs
    return chosen
