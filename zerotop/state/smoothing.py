"""A smoothed line through noisy values, without the lag of a plain moving average."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

SPANS_SHOWN = 24
"""A smoothed line has about this many independent pieces: enough to bend, too few to follow the noise."""
FEWEST = 24
"""Fewer values are joined as they are."""


def smooth(values: Sequence[float | None], span: float | None = None) -> list[float | None]:
    """The values averaged with exponential weights to both sides, so that bends stay where they are. span: width of the
    average in values; None: as the number of values asks for. A gap (None, NaN, infinity) stays a gap, and so do few
    values stay what they are."""
    count = len(values)
    if count < FEWEST:
        return list(values)
    span = max(2.0, count / SPANS_SHOWN) if span is None else span
    keep = math.exp(-2.0 / span)
    forward, backward = _one_way(values, keep), _one_way(values[::-1], keep)[::-1]
    result: list[float | None] = []
    for value, (sum_a, weight_a), (sum_b, weight_b) in zip(values, forward, backward, strict=True):
        if value is None or not math.isfinite(value):
            result.append(None)
        else:  # the value itself is in both sums
            result.append((sum_a + sum_b - value) / (weight_a + weight_b - 1.0))
    return result


def smooth_last(values: Sequence[float]) -> float | None:
    """The last of the smoothed values, which nothing comes after; all are finite. None without values."""
    if len(values) < FEWEST:
        return values[-1] if values else None
    keep = math.exp(-2.0 / max(2.0, len(values) / SPANS_SHOWN))
    total = weight = 0.0
    for value in values:
        total, weight = total * keep + value, weight * keep + 1.0
    return total / weight


def _one_way(values: Sequence[float | None], keep: float) -> list[tuple[float, float]]:
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = total * keep, weight * keep
        if value is not None and math.isfinite(value):
            total, weight = total + value, weight + 1.0
        sums.append((total, weight))
    return sums


def envelope(
    values: Sequence[float | None], smoothed: Sequence[float | None]
) -> list[tuple[float | None, float | None]]:
    """(low, high) around each smoothed value: it, and how far the values of its neighbourhood lie below and above their
    own smoothed ones. So the band is as wide as the noise, also where the line is steep."""
    reach = max(1, len(values) // (4 * SPANS_SHOWN))
    apart = [
        value - line if value is not None and line is not None and math.isfinite(value) else None
        for value, line in zip(values, smoothed, strict=True)
    ]
    lows, highs = _extreme(apart, reach, -1.0), _extreme(apart, reach, 1.0)
    return [
        (None, None) if line is None or low is None or high is None else (line + min(0.0, low), line + max(0.0, high))
        for line, low, high in zip(smoothed, lows, highs, strict=True)
    ]


def _extreme(values: Sequence[float | None], reach: int, sign: float) -> list[float | None]:
    """The largest (sign 1) or smallest (sign -1) of the values up to `reach` places away."""
    best: deque[int] = deque()  # places whose values fall
    signed = [-math.inf if value is None else sign * value for value in values]
    found: list[float | None] = []
    for place in range(len(values) + reach if values else 0):
        if place < len(values):
            while best and signed[best[-1]] <= signed[place]:
                best.pop()
            best.append(place)
        while best[0] < place - 2 * reach:
            best.popleft()
        if place >= reach:
            top = signed[best[0]]
            found.append(sign * top if math.isfinite(top) else None)
    return found
