"""Rates from the driver's byte counters, by the difference of two readings."""

from __future__ import annotations

import math

_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9, 7: 15.13e9}
"""PCIe generation -> bytes per second and lane, one direction, after encoding."""
_WRAP = 2**32


class CounterRate:
    """The rate of one counter. It may wrap at 32 bits, and it starts again when the driver is reloaded or the GPU is
    reset."""

    def __init__(self) -> None:
        self._count = 0
        self._at_s: float | None = None
        self._rate: float | None = None

    def add(self, count: int, at_s: float, *, narrow: bool = False, most_per_s: float = math.inf) -> float | None:
        """The rate per second since the previous reading, or None if it cannot be told: at the first reading, after
        the counter has started again, or if it may have wrapped more than once.

        `narrow`: the counter has 32 bits. `most_per_s`: what the link can carry at most. A reading that is not newer
        than the one before leaves the rate as it was.
        """
        before, before_s = self._count, self._at_s
        if before_s is not None and at_s <= before_s:
            return self._rate
        self._count, self._at_s = count, at_s
        self._rate = None if before_s is None else _rate(count, before, at_s - before_s, narrow, most_per_s)
        return self._rate


def _rate(count: int, before: int, seconds: float, narrow: bool, most_per_s: float) -> float | None:
    if narrow and most_per_s * seconds >= _WRAP:
        return None
    moved = count - before
    if moved < 0:
        if before >= _WRAP or math.isinf(most_per_s):
            return None
        moved += _WRAP
    rate = moved / seconds
    return rate if rate <= 1.2 * most_per_s else None


def pcie_bytes_per_s(generation: float | None, width: float | None) -> float:
    """What a PCIe link can carry in one direction; infinite if that is not known."""
    lane = _LANE_BYTES_PER_S.get(int(generation or 0))
    return lane * width if lane and width else math.inf
