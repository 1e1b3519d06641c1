"""Whether the loss is well: where it is heading, its lowest value, and how it stands against an earlier run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from zerotop.state.series import Series
from zerotop.state.smoothing import smooth, smooth_last

Direction = Literal["falling", "flat", "rising", "not a number", "too early"]
FEWEST = 10
"""Points without which there is no trend."""
SURE = 2.5
"""A slope is one from so many standard errors on; below it the loss is flat within its noise."""


@dataclass(frozen=True)
class EarlierRun:
    """The loss of another run by rising step."""

    name: str
    points: tuple[tuple[float, float], ...]

    @cached_property
    def steps(self) -> list[float]:
        """The steps of the points."""
        return [step for step, _ in self.points]

    @cached_property
    def smoothed(self) -> list[float | None]:
        """The losses of the points without their noise."""
        return smooth([loss for _, loss in self.points])

    def loss_at(self, step: float) -> float | None:
        """The smoothed loss at a step, interpolated; None outside of the run's steps."""
        steps, values = self.steps, self.smoothed
        if not steps or not steps[0] <= step <= steps[-1]:
            return None
        place = bisect_left(steps, step)
        after = values[place]
        if after is None or steps[place] == step or not place:
            return after
        before = values[place - 1]
        if before is None:
            return None
        share = (step - steps[place - 1]) / (steps[place] - steps[place - 1])
        return before + share * (after - before)


@dataclass(frozen=True)
class LossTrend:
    """`per_1000` is the change of the loss per 1000 steps over the last tenth of the run; `smoothed` the loss now
    without its noise; `against` how much higher it is than that of an earlier run at the same step."""

    direction: Direction
    newest: float | None = None
    smoothed: float | None = None
    per_1000: float | None = None
    best: float | None = None
    best_step: int | None = None
    not_finite: int = 0
    """Steps whose loss was NaN or infinite, of those that are kept."""
    against: float | None = None
    against_name: str = ""
    norm: float | None = None
    """The newest gradient norm."""
    norms: tuple[float, ...] = ()
    """Those of the newest steps, oldest first."""
    spikes: int = 0
    """Steps at which the norm was many times what it was before."""
    skipped: int = 0
    """Steps that changed nothing, because of an overflow or a norm that was not finite."""


def loss_trend(series: Series, earlier: EarlierRun | None = None) -> LossTrend:
    """The trend over the last tenth of the steps, of at least FEWEST points."""
    points = [(float(point.step), point.loss) for point in series if point.loss is not None]
    finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
    bad = len(points) - len(finite)
    last = series.newest
    norm, skipped = (last.grad_norm, last.skipped_steps) if last is not None else (None, 0)
    if not finite:
        none = LossTrend("not a number" if bad else "too early", points[-1][1] if points else None, not_finite=bad)
        return replace(none, norm=norm, skipped=skipped)
    best, best_step = min((loss, step) for step, loss in finite)
    newest = points[-1][1]
    recent = finite[-max(2 * FEWEST, len(finite) // 10) :]
    level = smooth_last([loss for _, loss in finite])
    against = earlier.loss_at(finite[-1][0]) if earlier is not None else None
    direction, slope = _direction(recent)
    if not math.isfinite(newest):
        direction = "not a number"
    return LossTrend(
        direction,
        newest,
        level,
        None if slope is None else 1000 * slope,
        best,
        int(best_step),
        bad,
        level - against if against is not None and level is not None else None,
        earlier.name if earlier is not None else "",
        norm,
        tuple(series.norms),
        series.spikes,
        skipped,
    )


def _direction(points: Sequence[tuple[float, float]]) -> tuple[Direction, float | None]:
    """The slope per step by least squares, if it is larger than what noise makes."""
    count = len(points)
    if count < FEWEST:
        return "too early", None
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 0:
        return "too early", None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    error = math.sqrt(rest / (count - 2) / spread)
    if abs(slope) <= SURE * error:
        return "flat", slope
    return ("falling" if slope < 0 else "rising"), slope
