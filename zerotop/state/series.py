"""Figures over steps, thinned so that a million steps take no more memory than a thousand."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence

from runtime.wire.messages import StepResult

POINTS_KEPT = 1024
SPIKE = 4.0
"""A gradient norm that is so many times the median of those before it is a spike."""
NORMS_BEFORE, NORMS_LEAST = 64, 16
"""Of how many norms that is the median, and without how many there is none: the first steps are restless."""


class Series:
    """The global figures of the optimizer steps, from the lowest rank that reports, at most POINTS_KEPT points.

    When full, every second point is dropped, and from then on only every 2^k-th step is kept: the whole run stays
    visible. The newest step is always there.
    """

    def __init__(self) -> None:
        self.stride = 1
        self._points: list[StepResult] = []
        self._newest: StepResult | None = None
        self._tokens: dict[int, float] = {}
        self._norms: deque[tuple[int, float]] = deque(maxlen=NORMS_BEFORE)
        """(step, gradient norm) of the newest steps, whichever points are kept."""
        self._spikes: deque[int] = deque(maxlen=POINTS_KEPT)
        """The steps at which the norm was a spike."""

    def add(self, result: StepResult) -> None:
        """Take the result of one step of one rank."""
        if result.tokens_per_s is not None:
            self._tokens[result.rank] = result.tokens_per_s
        lowest = self._newest.rank if self._newest else result.rank
        if result.rank > lowest:
            return
        if self._newest and result.step <= self._newest.step:
            self.cut(result.step - 1)
        self._newest = result
        self._take_norm(result)
        if result.step % self.stride == 0 or not self._points:
            self._points.append(result)
        if len(self._points) > POINTS_KEPT:
            self.stride *= 2
            self._points = [point for point in self._points if point.step % self.stride == 0]

    def _take_norm(self, result: StepResult) -> None:
        norm = result.grad_norm
        if norm is None or result.skipped:
            return
        before = [value for _, value in self._norms]
        if not math.isfinite(norm) or (len(before) >= NORMS_LEAST and norm > SPIKE * statistics.median(before)):
            self._spikes.append(result.step)
        if math.isfinite(norm):
            self._norms.append((result.step, norm))

    @property
    def spikes(self) -> int:
        """How many steps, of those that have been seen, had a spike of the gradient norm."""
        return len(self._spikes)

    @property
    def norms(self) -> Sequence[float]:
        """The finite gradient norms of the newest steps, oldest first."""
        return [norm for _, norm in self._norms]

    def cut(self, step: int) -> None:
        """Drop the steps after `step`: a new attempt continues from there."""
        self._norms = deque((one for one in self._norms if one[0] <= step), NORMS_BEFORE)
        self._spikes = deque((at for at in self._spikes if at <= step), POINTS_KEPT)
        self._points = [point for point in self._points if point.step <= step]
        if self._newest is not None and self._newest.step > step:
            self._newest = self._points[-1] if self._points else None

    def copy(self) -> Series:
        """An independent copy."""
        other = Series()
        other.stride, other._points, other._newest, other._tokens = (
            self.stride,
            list(self._points),
            self._newest,
            dict(self._tokens),
        )
        other._norms, other._spikes = self._norms.copy(), self._spikes.copy()
        return other

    def __iter__(self) -> Iterator[StepResult]:
        yield from self._points
        if self._newest is not None and self._newest_is_extra:
            yield self._newest

    def __len__(self) -> int:
        return len(self._points) + int(self._newest_is_extra)

    @property
    def _newest_is_extra(self) -> bool:
        """Whether the newest step is not one of the points that are kept."""
        return self._newest is not None and (not self._points or self._points[-1].step != self._newest.step)

    @property
    def first(self) -> StepResult | None:
        """The oldest step that is kept."""
        return self._points[0] if self._points else self._newest

    @property
    def newest(self) -> StepResult | None:
        """The newest step."""
        return self._newest if self._newest_is_extra else self._points[-1] if self._points else None

    def messages(self) -> list[StepResult]:
        """The points as a list."""
        return list(self)

    @property
    def ranks_reporting(self) -> int:
        """How many ranks `tokens_per_s` is the sum of."""
        return len(self._tokens)

    def begin_attempt(self) -> None:
        """All ranks are new processes, and their speed is not known yet."""
        self._tokens.clear()

    @property
    def tokens_per_s(self) -> float | None:
        """The sum of the newest figures of all reporting ranks."""
        return sum(self._tokens.values()) if self._tokens else None

    def recent_step_ms(self, count: int = 20) -> list[float]:
        """Times of the newest `count` points."""
        return [point.step_ms for point in self.recent(count)]

    def recent(self, count: int) -> list[StepResult]:
        """The newest `count` points, oldest first, without a walk through the others."""
        if self._newest is not None and self._newest_is_extra:
            return [*self._points[len(self._points) - min(count - 1, len(self._points)) :], self._newest]
        return self._points[-count:]
