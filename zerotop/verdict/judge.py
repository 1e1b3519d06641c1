"""The verdict on a run: the most urgent finding, held long enough not to flicker."""

from __future__ import annotations

from collections.abc import Callable

from zerotop.state.run import RunState
from zerotop.verdict.bound import find_gpu_fault, find_memory_bound, find_offload_bound, find_throttled
from zerotop.verdict.calm import calm
from zerotop.verdict.figures import Figures, History
from zerotop.verdict.finding import CALM, PASSING, STANDSTILL, Finding
from zerotop.verdict.slow import find_contention, find_data_starvation, find_slow_link
from zerotop.verdict.stopped import find_dead, find_failed, find_wedged
from zerotop.verdict.straggler import find_straggler
from zerotop.verdict.stuck import find_desync, find_hang

Rule = Callable[[Figures], Finding | None]
URGENT: tuple[Rule, ...] = (
    find_failed,
    find_dead,
    find_wedged,
    find_desync,
    find_hang,
    find_gpu_fault,
    find_memory_bound,
    find_straggler,
)
"""Most urgent first: the first one that finds something is the verdict."""
SHARED: tuple[Rule, ...] = (find_contention, find_slow_link, find_data_starvation)
"""What all ranks suffer from: what costs most is the verdict."""
MINOR: tuple[Rule, ...] = (find_throttled, find_offload_bound)
REPLACES = 1.5
"""Of the shared ones, the verdict so far gives way only to one that costs so many times as much."""
CONFIRM_S = 1.0
"""A new warning must be found for this long: one look may fall between two packets."""
CLEAR_S = 8.0
"""A warning that is not found any more stays for this long. Windows empty step by step, and noise comes back."""
CALM_S = 2.0
"""A checkpoint, an evaluation or a compilation shorter than this is not worth a word."""


class Judge:
    """Call `look` about twice a second with the state of the run."""

    def __init__(self) -> None:
        self.verdict: Finding | None = None
        self._history = History()
        self._coming: Finding | None = None
        self._coming_since_s = 0.0
        self._last_seen_s = 0.0

    def look(self, state: RunState, now_s: float) -> Finding:
        """The verdict at `now_s`, a monotonic clock."""
        figures = self._history.figures(state, self.verdict, now_s)
        found = self._first(figures)
        held = self._held(figures, found, now_s)
        self.verdict = held
        return held

    def _first(self, figures: Figures) -> Finding:
        for rule in URGENT:
            if (finding := rule(figures)) is not None:
                return finding
        shared = [finding for rule in SHARED if (finding := rule(figures)) is not None]
        if shared:
            return max(shared, key=lambda one: one.cost * (REPLACES if one.same_as(self.verdict) else 1.0))
        for rule in MINOR:
            if (finding := rule(figures)) is not None:
                return finding
        return calm(figures)

    def _held(self, figures: Figures, found: Finding, now_s: float) -> Finding:
        before = self.verdict
        if before is None or found.same_as(before):
            self._coming, self._last_seen_s = None, now_s
            return found
        if before.severity == "warning" and found.severity == "info":
            # While ranks evaluate, save or compile, nobody can tell whether the old trouble is over.
            if found.what in PASSING:
                self._last_seen_s = now_s
                return before
            if found.what in ("healthy", "offload-bound") and now_s - self._last_seen_s < CLEAR_S:
                return before
        if found.severity == "error" and found.what != "desync":
            return self._take(found, now_s)
        if before.what in STANDSTILL and found.severity == "info":
            return self._take(found, now_s)
        if found.what in CALM - PASSING:
            return self._take(found, now_s)
        wait_s = CALM_S if found.what in PASSING else CONFIRM_S
        if not found.same_as(self._coming):
            self._coming_since_s = now_s
        self._coming = found
        return self._take(found, now_s) if now_s - self._coming_since_s >= wait_s else before

    def _take(self, found: Finding, now_s: float) -> Finding:
        self._coming, self._last_seen_s = None, now_s
        return found
