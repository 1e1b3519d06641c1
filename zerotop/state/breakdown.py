"""Where the time of each rank's steps went. The parts sum to the step.

compute      forward and backward
waiting      blocked in a collective until the last rank had entered it
transfer     blocked in a collective, or busy with one, after that
data         outside the engine: data loading, and whatever else the script does between two calls
optimizer    the update of parameters and states
offload      updates and copies between host and device that the step waited for
control      checkpoint, evaluation, pause

A rank knows how long it was blocked (`StepResult.phase_wait_ms`), but not for whom: that takes the durations of all
ranks (waits.py).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from runtime.wire.messages import StepResult

Part = Literal["compute", "waiting", "transfer", "data", "optimizer", "offload", "control"]
PARTS: tuple[Part, ...] = ("compute", "waiting", "transfer", "data", "optimizer", "offload", "control")
PART_OF_PHASE: dict[str, Part] = {
    "forward": "compute",
    "backward": "compute",
    "reduce": "transfer",
    "gather": "transfer",
    "data": "data",
    "idle": "data",
    "step": "optimizer",
    "offload": "offload",
}
"""What a phase is without its waits; any other is control."""
RECENT_STEPS = 20
TYPICAL_STEPS = 8
"""So many steps tell what a step is usually spent on now."""
EARLIER_STEPS = 200
"""Steps kept as a rank's own history, which its recent ones are compared with."""


@dataclass(frozen=True)
class Breakdown:
    """The time of one rank, in ms per step."""

    compute: float = 0.0
    waiting: float = 0.0
    transfer: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    offload: float = 0.0
    control: float = 0.0
    exposed: float = 0.0
    """Of `waiting` and `transfer`: the time for which the training thread was blocked."""

    @property
    def step_ms(self) -> float:
        """The whole step: the sum of the parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[Part, float]:
        """Part -> ms, in the order of PARTS."""
        return {part: getattr(self, part) for part in PARTS}

    def share(self, part: Part) -> float:
        """0..1: the part of the step; 0 for an empty step."""
        whole = self.step_ms
        return float(getattr(self, part)) / whole if whole > 0 else 0.0


def breakdown_of(result: StepResult) -> Breakdown:
    """The breakdown of one step. All of the blocked time counts as waiting: how much of it was transfer, one rank alone
    cannot know."""
    times: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    exposed = 0.0
    for phase, phase_ms in result.phase_ms.items():
        blocked = min(phase_ms, result.phase_wait_ms.get(phase, 0.0))
        times[PART_OF_PHASE.get(phase, "control")] += phase_ms - blocked
        exposed += blocked
    times["waiting"] += exposed
    return Breakdown(**times, exposed=exposed)


def mean_breakdown(breakdowns: Iterable[Breakdown]) -> Breakdown:
    """The mean of each part; all zero without any."""
    kept = list(breakdowns)
    if not kept:
        return Breakdown()
    return Breakdown(
        **{part: statistics.fmean(getattr(one, part) for one in kept) for part in PARTS},
        exposed=statistics.fmean(one.exposed for one in kept),
    )


class Breakdowns:
    """The newest steps of every rank."""

    def __init__(self) -> None:
        self._broken_down: dict[int, deque[Breakdown]] = {}
        self._new: dict[int, deque[StepResult]] = {}
        """Steps that nobody has asked for yet: a screen takes all of them in, and asks for none."""

    def copy(self) -> Breakdowns:
        """An independent copy."""
        other = Breakdowns()
        other._broken_down = {rank: steps.copy() for rank, steps in self._steps.items()}
        return other

    def add(self, result: StepResult) -> None:
        """Take the result of one step of one rank."""
        if result.phase_ms:
            self._new.setdefault(result.rank, deque(maxlen=EARLIER_STEPS + RECENT_STEPS)).append(result)

    @property
    def _steps(self) -> dict[int, deque[Breakdown]]:
        """Rank -> its newest steps."""
        for rank, results in self._new.items():
            kept = self._broken_down.setdefault(rank, deque(maxlen=EARLIER_STEPS + RECENT_STEPS))
            kept.extend(map(breakdown_of, results))
        self._new.clear()
        return self._broken_down

    def steps(self, rank: int) -> int:
        """How many steps of the rank are known."""
        return len(self._steps.get(rank, ()))

    def recent(self, waited_ms: Mapping[int, float], steps: int = RECENT_STEPS) -> dict[int, Breakdown]:
        """Rank -> the mean of its newest `steps` steps. waited_ms: rank -> what it waited for peers, per step, over the
        same steps (waits.py); the rest of its blocked time is transfer. Without it all of that counts as waiting."""
        found = {}
        for rank, kept in sorted(self._steps.items()):
            mean = mean_breakdown(list(kept)[-steps:])
            waiting = min(mean.exposed, waited_ms.get(rank, mean.exposed))
            found[rank] = replace(mean, waiting=waiting, transfer=mean.transfer + mean.exposed - waiting)
        return found

    def lasting_share(self, rank: int, part: Part) -> float:
        """0..1: the share of the step that `part` takes on a rank, without what happens once. It is the median of the
        newest TYPICAL_STEPS steps, so that a change is seen after a few steps, or the share of the recent ones without
        the step in which the part took longest, if that is more: data may be late in every tenth step only."""
        recent = list(self._steps.get(rank, ()))[-RECENT_STEPS:]
        if len(recent) < 2:
            return recent[0].share(part) if recent else 0.0
        typical = statistics.median(one.share(part) for one in recent[-TYPICAL_STEPS:])
        longest = max(range(len(recent)), key=lambda index: float(getattr(recent[index], part)))
        others = mean_breakdown(one for index, one in enumerate(recent) if index != longest)
        return max(typical, others.share(part))

    def usual_ms(self, rank: int, part: Part) -> float | None:
        """The median of `part` over the rank's steps before the recent ones; None with fewer than RECENT_STEPS of
        them."""
        earlier = list(self._steps.get(rank, ()))[:-RECENT_STEPS]
        if len(earlier) < RECENT_STEPS:
            return None
        return float(statistics.median(getattr(one, part) for one in earlier))
