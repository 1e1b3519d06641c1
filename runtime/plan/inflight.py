"""Buffers that the engine holds beside the states, in elements: simulates backwards of runtime/zero. Torch-free.

Units are (name, padded elements) in forward order. Gradients of "root" and "small" may arrive at any time in a backward
(runtime/zero/cut.py); the other units are filled last to first, and each is reduced while the next one fills.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from runtime.plan.constants import REDUCTIONS_IN_FLIGHT

ALWAYS_OPEN = ("root", "small")
"""Units whose gradients may arrive at any time in a backward."""
BACKWARDS = 4
"""Simulated backwards, after which the buffers no longer change."""

Units = Sequence[tuple[str, int]]
"""(name, padded elements) of each unit, in forward order."""


class _Pool:
    """Simulates runtime/zero/pool.py with sizes instead of buffers."""

    def __init__(self) -> None:
        self.held = 0
        self._free: list[int] = []

    def borrow(self, numel: int, exact: bool = False) -> int:
        """Size of the smallest free buffer that is large enough, or else of a new one, which replaces one that is too
        small. exact: of `numel` elements, and it replaces none."""
        fitting = [size for size in self._free if (size == numel if exact else size >= numel)]
        if fitting:
            self._free.remove(min(fitting))
            return min(fitting)
        self.held += numel - (self._free.pop(0) if self._free and not exact else 0)
        return numel

    def give_back(self, size: int) -> None:
        self._free.append(size)


def borrowed_for_backward(units: Units, arrivals: Sequence[str] = ()) -> int:
    """Elements of full gradient buffers that are borrowed in a backward, each from the unit's first gradient until it
    is reduced (stages 2 and 3).

    arrivals: the unit of each parameter, in the order in which backward makes their gradients. Default: one unit after
    the other, with "root" and "small" from the first to the last.
    """
    sizes = {name: numel for name, numel in units if numel}
    always_open = [name for name in sizes if name in ALWAYS_OPEN]
    others = [name for name in reversed(sizes) if name not in ALWAYS_OPEN]
    arrivals = arrivals or [*always_open, *others, *always_open]
    pool, sequence = _Pool(), [*others, *always_open]
    for _ in range(BACKWARDS):  # later ones find the buffers of earlier ones, and reduce in the order of arrival
        _backward(pool, sizes, arrivals, sequence)
        sequence = [name for at, name in enumerate(arrivals) if name not in arrivals[at + 1 :]]
    return pool.held


def _backward(pool: _Pool, sizes: dict[str, int], arrivals: Sequence[str], sequence: Sequence[str]) -> None:
    lent, left = dict[str, int](), Counter(arrivals)
    flying, waiting = list[int](), list(sequence)
    for name in arrivals:
        if name not in lent:
            lent[name] = pool.borrow(sizes[name], exact=name in ALWAYS_OPEN)
        left[name] -= 1
        while waiting and not left[waiting[0]]:
            _finish_oldest(pool, flying)
            flying.append(lent[waiting.pop(0)])
    for buffer in flying:
        pool.give_back(buffer)


def copied_for_reduction(units: Units) -> int:
    """Elements of the copies of full gradients that are reduced if the communication dtype is not theirs (stages 0 and
    1, or zerotop.accumulate "local"). Each is made when the reductions before it are done."""
    pool, flying = _Pool(), list[int]()
    units = [(name, numel) for name, numel in units if numel]
    others = [numel for name, numel in reversed(units) if name not in ALWAYS_OPEN]
    for numel in [*others, *(numel for name, numel in units if name in ALWAYS_OPEN)]:
        _finish_oldest(pool, flying)
        flying.append(pool.borrow(numel))
    return pool.held


def unsharded_params(units: Units) -> int:
    """Elements of parameters that stage 3 has unsharded at a time: a unit, the one that comes next, and the root
    unit."""
    root = sum(numel for name, numel in units if name == "root")
    others = [numel for name, numel in units if name not in ALWAYS_OPEN]
    return root + max((one + next_ for one, next_ in itertools.pairwise(others)), default=sum(others))


def _finish_oldest(pool: _Pool, flying: list[int]) -> None:
    """End the oldest reduction if REDUCTIONS_IN_FLIGHT are under way."""
    if len(flying) == REDUCTIONS_IN_FLIGHT:
        pool.give_back(flying.pop(0))
