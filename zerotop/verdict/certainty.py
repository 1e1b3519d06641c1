"""When a cost per step is neither small nor chance."""

from __future__ import annotations

import math
import statistics

WINDOWS: tuple[tuple[int, float, float], ...] = (
    (4, 0.25, 16.0),
    (8, 0.30, 5.5),
    (8, 0.10, 9.0),
    (16, 0.05, 9.0),
    (40, 0.05, 7.0),
)
"""(steps, share, certainty): a rank is named if over the newest `steps` it costs each other rank more than this share
of the step, net of what they cost it, and the mean of that is `certainty` times its standard error. Where ranks take
turns none is named, however much they wait in total, nor is a rank for one long pause. Few steps need a large and
steady cost, so that a bad fault is named within seconds, and noise is not."""
LEAST_STEPS = 8
"""Fewer steps give no verdict on all ranks together."""
KEPT_STEPS, KEPT_SHARE, KEPT_CERTAINTY = 16, 0.025, 2.0
"""Limits for what is the verdict already: it must not come and go at every step."""


def certain_window(cost_ms: list[float], step_ms: float, strictness: float, least_share: float = 0.0) -> int | None:
    """The shortest of WINDOWS over which these costs, one per step, are neither small nor chance."""
    for steps, share, certainty in WINDOWS:
        if costs_time(cost_ms, step_ms, steps, max(share, least_share), strictness * certainty):
            return steps
    return None


def costs_time(cost_ms: list[float], step_ms: float, steps: int, share: float, certainty: float) -> bool:
    """Whether the newest costs are on average above `share` of a step and `certainty` standard errors."""
    newest = cost_ms[-steps:]
    if len(newest) < (min(steps, LEAST_STEPS) if certainty > KEPT_CERTAINTY else WINDOWS[0][0]):
        return False
    mean = statistics.fmean(newest)
    # statistics.stdev computes in fractions, at fifty times the time.
    deviation = math.sqrt(math.fsum((cost - mean) ** 2 for cost in newest) / (len(newest) - 1))
    error = deviation / math.sqrt(len(newest))
    recent = statistics.fmean(newest[-LEAST_STEPS:])
    return min(mean, recent) > share * step_ms and mean >= certainty * error
