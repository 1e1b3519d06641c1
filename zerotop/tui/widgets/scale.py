"""The axes of a plot: which range is shown, and which round numbers stand beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TAIL = 0.02
"""Share of the values at each end that may lie outside of the range that is shown."""
HEADROOM = 0.6
"""Values further outside than this share of the others' range are cut off."""
ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


def robust_range(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of what is worth showing of finite values, at least one. Everything, unless a few values at an end
    are so far away that they would flatten the rest."""
    ordered = sorted(values)
    low, high, count = ordered[0], ordered[-1], len(ordered)
    if count >= 8:
        cut = max(1, math.ceil(TAIL * count))
        inner_low, inner_high = ordered[cut], ordered[count - 1 - cut]
        body = inner_high - inner_low
        if body > 0 and high - inner_high > HEADROOM * body:
            high = inner_high + 0.25 * body
        if body > 0 and inner_low - low > HEADROOM * body:
            low = inner_low - 0.25 * body
    if high - low < 1e-12 + 1e-9 * abs(high):
        pad = max(abs(high) * 0.05, 1e-12) if high else 1.0
        return low - pad, high + pad
    return low, high


def round_step(span: float, most: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that divides `span` into at most `most` parts."""
    if span <= 0 or most < 1 or not math.isfinite(span):
        return 1.0
    least = span / most
    power = 10.0 ** math.floor(math.log10(least))
    return power * next((factor for factor in ROUND if power * factor >= least * 0.999999), 10.0)


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within low..high, at most `most` + 1 of them."""
    step = round_step(high - low, most)
    if step <= 0 or (high - low) / step > 1000:
        return []
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """The same on a logarithmic axis of positive values: powers of ten, with their 2- and 5-fold where there is room;
    round numbers where the range is less than a decade."""
    if high / low < 10:
        return [tick for tick in round_ticks(low, high, most) if tick > 0]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 5), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most + 1:
            return ticks
    return ticks[:: max(1, len(ticks) // max(1, most))]


_LOGARITHMS = (-700.0, 690.0)
"""Of the least and the largest value that a logarithmic axis goes to: beyond them numbers lose digits, then end."""


@dataclass(frozen=True)
class Axis:
    """Values between `low` and `high`, spread over `dots` positions."""

    low: float
    high: float
    dots: int
    log: bool = False

    def at(self, value: float) -> int:
        """The position of a value; those outside are at the ends."""
        if self.high <= self.low or self.dots < 2:
            return 0
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round((value - low) * (self.dots - 1) / (high - low))

    def value(self, position: float) -> float:
        """The value at a position."""
        share = position / max(1, self.dots - 1)
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the axis."""
        return (log_ticks if self.log else round_ticks)(self.low, self.high, most)


def value_axis(values: Iterable[float], dots: int, log: bool) -> Axis:
    """The axis for these values, at least one of them. Values that are not positive have no place on a logarithmic
    axis: if there is no other, it is linear."""
    kept = list(values)
    positive = [value for value in kept if value > 0]
    if log and positive:
        low, high = robust_range([math.log(value) for value in positive])
        low, high = (math.exp(min(max(edge, _LOGARITHMS[0]), _LOGARITHMS[1])) for edge in (low, high))
        return Axis(low, high, dots, True)
    return Axis(*robust_range(kept), dots)
