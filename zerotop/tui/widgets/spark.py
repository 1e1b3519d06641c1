"""A curve in a line of text: one block character for each of the newest values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

LEVELS = "▁▂▃▄▅▆▇█"
UNKNOWN = "×"
CALM = 0.2
"""A curve of values that differ by a smaller share than this does not fill its height: noise is no mountain."""


def spark(values: Sequence[float], cells: int, low: float, high: float) -> str:
    """The newest `cells` values between `low` and `high`, the newest at the right."""
    span = high - low or 1.0
    newest = list(islice(reversed(values), max(0, cells)))[::-1]
    return "".join(_level((value - low) / span) for value in newest)


def relative_range(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) for `spark` of values without a scale of their own. The smallest stands at the bottom."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return low, max(high, low * (1 + CALM)) or 1.0


def _level(share: float) -> str:
    if not math.isfinite(share):
        return UNKNOWN
    return LEVELS[round(min(1.0, max(0.0, share)) * (len(LEVELS) - 1))]
