"""What the engine holds beside the states, in elements: a backward or two, played through as runtime/zero does.
Torch-free.

Units are (name, padded elements) in forward order. "root" and "small" are open for gradients through the whole
backward (runtime/zero/cut.py); the others are filled last to first, and each is reduced while the next one fills.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from runtime.plan.constants import REDUCTIONS_IN_FLIGHT

EVERYWHERE = ("root", "small")
BACKWARDS = 4
"""After so many the buffers are those of any later one."""

Units = Sequence[tuple[str, int]]


class _Pool:
    """Sizes where runtime/zero/pool.py has buffers."""

    def __init__(self) -> None:
        self.held = 0
        self._free: list[int] = []

    def borrow(self, numel: int, exact: bool = False) -> int:
        """The size of the smallest free buffer that is large enough, or else of a new one, for which one that is too
        small makes room. exact: of just so many elements, and nothing makes room for it."""
        fitting = [size for size in self._free if (size == numel if exact else size >= numel)]
        if fitting:
            self._free.remove(min(fitting))
            return min(fitting)
        self.held += numel - (self._free.pop(0) if self._free and not exact else 0)
        return numel

    def give_back(self, size: int) -> None:
        self._free.append(size)


def borrowed_for_backward(units: Units, arrivals: Sequence[str] = ()) -> int:
    """Of whole-gradient buffers that are borrowed for one backward, each unit's from its first gradient until it is
    reduced (stages 2 and 3).

    arrivals: the unit of each parameter, in the order in which backward makes their gradients. Without it, units follow
    one another, and those that are open all along are there from the first to the last.
    """
    sizes = {name: numel for name, numel in units if numel}
    everywhere = [name for name in sizes if name in EVERYWHERE]
    others = [name for name in reversed(sizes) if name not in EVERYWHERE]
    arrivals = arrivals or [*everywhere, *others, *everywhere]
    pool, sequence = _Pool(), [*others, *everywhere]
    for _ in range(BACKWARDS):  # later ones find the buffers of earlier ones, and reduce in the order of arrival
        _backward(pool, sizes, arrivals, sequence)
        sequence = [name for at, name in enumerate(arrivals) if name not in arrivals[at + 1 :]]
    return pool.held


def _backward(pool: _Pool, sizes: dict[str, int], arrivals: Sequence[str], sequence: Sequence[str]) -> None:
    lent, left = dict[str, int](), Counter(arrivals)
    flying, waiting = list[int](), list(sequence)
    for name in arrivals:
        if name not in lent:
            lent[name] = pool.borrow(sizes[name], exact=name in EVERYWHERE)
        left[name] -= 1
        while waiting and not left[waiting[0]]:
            _land(pool, flying)
            flying.append(lent[waiting.pop(0)])
    for buffer in flying:
        pool.give_back(buffer)


def copied_for_reduction(units: Units) -> int:
    """Of the copies in which whole gradients travel, where that is another precision than theirs (stages 0 and 1, or
    zerotop.accumulate "local"): each is made when the reductions before it are done."""
    pool, flying = _Pool(), list[int]()
    others = [numel for name, numel in reversed(units) if name not in EVERYWHERE]
    for numel in [*others, *(numel for name, numel in units if name in EVERYWHERE)]:
        _land(pool, flying)
        flying.append(pool.borrow(numel))
    return pool.held


def gathered(units: Units) -> int:
    """Of parameters that stage 3 has gathered at a time: a unit and the one that comes next, and the root unit from the
    first forward to the update."""
    root = sum(numel for name, numel in units if name == "root")
    others = [numel for name, numel in units if name not in EVERYWHERE]
    return root + max((one + next_ for one, next_ in itertools.pairwise(others)), default=sum(others))


def _land(pool: _Pool, flying: list[int]) -> None:
    """The oldest reduction ends before there are more than REDUCTIONS_IN_FLIGHT."""
    if len(flying) == REDUCTIONS_IN_FLIGHT:
        pool.give_back(flying.pop(0))
