"""How far a run is, and when it will be done."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from zerotop.state.condition import Condition, condition_of, silent_s
from zerotop.state.run import RunState


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` (None: a script decides). `eta_s` is None while no step time is known, or no steps are
    taken."""

    step: int
    steps: int | None
    step_ms: float | None  # median of the recent steps
    eta_s: float | None
    tokens_per_s: float | None  # of the whole run

    @property
    def share(self) -> float | None:
        """0..1 of all steps; None if a script decides."""
        return min(1.0, self.step / self.steps) if self.steps else None


def progress(state: RunState, connection: str = "live", condition: Condition | None = None) -> Progress:
    """The ETA uses the median of recent steps, so that one slow step (a checkpoint, a hiccup) does not move it.
    condition: that of the state, if it is known already."""
    hello = state.hello
    steps = hello.steps if hello else None
    if steps is not None and state.step > steps:
        steps = None  # the script takes more than the config says
    recent = state.series.recent_step_ms(20)
    step_ms = statistics.median(recent) if recent else None
    done = state.step
    eta_s = (
        (steps - done) * step_ms / 1000
        if steps and step_ms is not None and (condition or condition_of(state, connection)).moving
        else None
    )
    # Ranks report their first step one after the other: the sum over some of them is not the speed of the run.
    whole = state.series.ranks_reporting >= state.world_size
    return Progress(done, steps, step_ms, eta_s, state.series.tokens_per_s if whole else None)


OVERDUE_STEPS, OVERDUE_S = 3, 3.0
"""The newest step is old after so many usual steps, and so many seconds at least."""


def overdue_s(state: RunState, step_ms: float | None) -> float | None:
    """Seconds since the newest step ended, if that is long ago for steps of `step_ms`. Measured by the clock of the
    rank that took it, plus the hub's since that rank's last packet: clocks of two machines are never compared."""
    newest = state.series.newest
    rank = state.ranks.get(newest.rank) if newest is not None else None
    if newest is None or step_ms is None or rank is None or rank.step is None or rank.heartbeat is None:
        return None
    since_s = (rank.heartbeat.now_ns - newest.end_ns) / 1e9 + silent_s(rank, state.hub_now_ns)
    return since_s if since_s >= max(OVERDUE_S, OVERDUE_STEPS * step_ms / 1000) else None


def steps_at_risk(state: RunState) -> int:
    """Optimizer steps that would be lost if the run failed now: those since the newest checkpoint, or since the
    start of this attempt."""
    start = state.hello.start_step if state.hello else 0
    saved = state.status.last_checkpoint_step if state.status else None
    return max(0, state.step - max(start, saved or 0))
