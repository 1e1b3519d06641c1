"""The conditions of rules, checked against a moment of the run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from runtime.wire.judgement import Verdict
from zerotop.alerts.metrics import Dimension, Metric, Reading, value_text
from zerotop.format import duration_text
from zerotop.state.run import RunState
from zerotop.state.stall import ranks_text

CHANGED_S = 60.0
"""For how long `verdict changes` holds after a change."""
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """What a condition found. `text`: the figures. `mark`: changes when something else is the matter, not when only the
    figures do."""

    text: str
    ranks: tuple[int, ...] = ()
    value: float | None = None
    mark: object = None


@dataclass(frozen=True)
class Moment:
    """What conditions look at. `still_s`: seconds since the last optimizer step, or since one could be expected; None
    while the run may rightly take none. `changed_s`: seconds since the verdict changed from `before` to `after`; None
    if it never did."""

    state: RunState
    still_s: float | None = None
    before: Verdict | None = None
    after: Verdict | None = None
    changed_s: float | None = None


class Condition(Protocol):
    """Part of a rule."""

    def look(self, moment: Moment) -> Match | None:
        """What it found if it holds, else None."""

    def now(self, moment: Moment) -> str:
        """The figures as they are, whether it holds or not; empty if nothing is known."""


@dataclass(frozen=True)
class Comparison:
    """METRIC OPERATOR VALUE. A metric of ranks, GPUs or nodes holds if it does for one of them; a value that is not
    known or not a number never does."""

    metric: Metric
    dimension: Dimension
    sign: str
    threshold: float

    def look(self, moment: Moment) -> Match | None:
        compare = OPERATORS[self.sign]
        found = [one for one in self._readings(moment) if compare(one.value, self.threshold)]
        return self._match(found) if found else None

    def now(self, moment: Moment) -> str:
        known = self._readings(moment)
        return self._match(known).text if known else ""

    def _readings(self, moment: Moment) -> list[Reading]:
        return [one for one in self.metric.readers[self.dimension](moment.state) if not math.isnan(one.value)]

    def _match(self, found: list[Reading]) -> Match:
        """The one that is furthest beyond the threshold speaks for all."""
        low = self.sign in ("<", "<=")
        first = min(found, key=lambda one: one.value) if low else max(found, key=lambda one: one.value)
        ranks = tuple(sorted({one.rank for one in found if one.rank is not None}))
        text = f"{self.metric.name} {value_text(first.value, self.dimension)}"
        if first.where:
            text += f" on {first.where}"
            others = len(found) - 1
            text += f" and {others} other{'s' * (others > 1)}" if others else ""
        return Match(text, ranks, first.value if math.isfinite(first.value) else None)


@dataclass(frozen=True)
class NotFinite:
    """METRIC is nan: NaN or an infinity."""

    metric: Metric
    dimension: Dimension

    def look(self, moment: Moment) -> Match | None:
        for reading in self.metric.readers[self.dimension](moment.state):
            if not math.isfinite(reading.value):
                where = f" on {reading.where}" if reading.where else ""
                ranks = () if reading.rank is None else (reading.rank,)
                return Match(f"{self.metric.name} {value_text(reading.value, 'number')}{where}", ranks)
        return None

    def now(self, moment: Moment) -> str:
        for reading in self.metric.readers[self.dimension](moment.state):
            return f"{self.metric.name} {value_text(reading.value, self.dimension)}"
        return ""


@dataclass(frozen=True)
class NoStep:
    """no step for TIME."""

    seconds: float

    def look(self, moment: Moment) -> Match | None:
        if moment.still_s is None or moment.still_s < self.seconds:
            return None
        return Match(self.now(moment), value=round(moment.still_s, 1))

    def now(self, moment: Moment) -> str:
        if moment.still_s is None:
            return ""
        return f"no step for {duration_text(moment.still_s)}, at step {moment.state.step}"


@dataclass(frozen=True)
class VerdictIs:
    """verdict is WHAT, verdict is not WHAT. Before the first verdict neither holds."""

    what: str
    negated: bool = False

    def look(self, moment: Moment) -> Match | None:
        verdict = moment.state.verdict
        if verdict is None or (verdict.what == self.what) == self.negated:
            return None
        return Match(verdict.text, tuple(verdict.ranks))

    def now(self, moment: Moment) -> str:
        verdict = moment.state.verdict
        return f"the verdict is {verdict.what}" if verdict is not None else ""


@dataclass(frozen=True)
class VerdictChanges:
    """verdict changes: it names something else, or other ranks. One of both is bad news: that a healthy run makes a
    checkpoint is no change."""

    def look(self, moment: Moment) -> Match | None:
        before, after = moment.before, moment.after
        if before is None or after is None or moment.changed_s is None or moment.changed_s > CHANGED_S:
            return None
        whose = f" ({ranks_text(tuple(after.ranks))})" if after.ranks else ""
        text = f"from {before.what} to {after.what}{whose}: {after.text.removeprefix(f'{after.what}: ')}"
        return Match(text, tuple(after.ranks), mark=(after.what, *after.ranks))

    def now(self, moment: Moment) -> str:
        verdict = moment.state.verdict
        return f"the verdict is {verdict.what}" if verdict is not None else ""
