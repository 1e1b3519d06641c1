"""Which rank waits for which, without comparing clocks.

In a collective every rank is held until the last one arrives. So the rank with the shortest duration came last, its
duration is the transfer, and the rest of any other rank's duration is waiting. Only durations are compared, never times
of two nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.wire.messages import Collectives
from zerotop.state.bandwidth import Bandwidth

OPEN_KEPT = 512
VERDICTS_KEPT = 1024
MIN_SKEW_US = 200
"""Below this, which rank came last is noise."""
WINDOW_STEPS = 20
"""All figures on waiting (table, banner, page of a rank) are over this many finished steps."""
STEPS_KEPT = 2 * WINDOW_STEPS
"""The longest window that a figure is over."""
HISTORY_STEPS = 240
"""Steps whose sums are kept for a picture of which rank came late when."""


@dataclass(frozen=True)
class Meeting:
    """One collective that all ranks have reported."""

    seq: int
    op: str
    bytes: int
    step: int
    transfer_us: int
    last_rank: int
    waited_us: dict[int, int]
    exposed_us: float = 0.0
    """For how long training threads were blocked by it: the mean over the ranks."""

    @property
    def skew_us(self) -> int:
        """The longest wait of a rank."""
        return max(self.waited_us.values(), default=0)


class _Record(NamedTuple):
    """What one rank reports of a collective."""

    op: str
    bytes: int
    step: int
    duration_us: int
    blocked_us: int


@dataclass(frozen=True)
class Mismatch:
    """A collective of which ranks have reported different operations or sizes."""

    seq: int
    reported: dict[int, tuple[str, int]]
    """Rank -> (operation, bytes)."""


@dataclass
class _Step:
    """The sums over the collectives of one step."""

    meetings: int = 0
    waited_us: dict[int, int] = field(default_factory=dict)
    blocked_us: dict[int, int] = field(default_factory=dict)
    """Of `waited_us`: the part for which the training thread was blocked."""
    excess_us: float = 0.0
    """How much longer the transfers took than those of these kinds usually take."""
    compared: int = 0
    """Collectives of which the usual time is known."""
    caused_us: dict[int, int] = field(default_factory=dict)
    came_last: dict[int, int] = field(default_factory=dict)
    step_ms: float = 0.0

    def copy(self) -> _Step:
        return _Step(
            self.meetings,
            dict(self.waited_us),
            dict(self.blocked_us),
            self.excess_us,
            self.compared,
            dict(self.caused_us),
            dict(self.came_last),
            self.step_ms,
        )


@dataclass(frozen=True)
class WaitWindow:
    """Waiting over the newest finished steps that had collectives; all dicts by rank, empty before the first."""

    steps: int
    step_ms: float  # mean of the same steps, of the slowest rank in each; 0 while none has reported
    waited_ms: dict[int, float]  # per step: what the rank waited for others
    blocked_ms: dict[int, float]  # per step: the part of it for which its training thread was blocked
    caused_ms: dict[int, float]  # per step: what one other rank, on average, waited for this one
    came_last: dict[int, int]  # collectives with a skew that matters in which the rank came last


class Waits:
    """Collects the collectives of all ranks and sums up who waited for whom in each step."""

    def __init__(self) -> None:
        self.meetings: deque[Meeting] = deque(maxlen=VERDICTS_KEPT)
        self.bandwidth = Bandwidth()
        self.mismatch: Mismatch | None = None
        """The newest collective in which the ranks disagree."""
        self._open: dict[tuple[str, int], dict[int, _Record]] = {}  # (group, seq) -> rank
        self._recent: dict[int, Collectives] = {}
        self._steps: dict[int, _Step] = {}

    def copy(self) -> Waits:
        """An independent copy."""
        other = Waits()
        other.meetings = self.meetings.copy()
        other.bandwidth, other.mismatch = self.bandwidth.copy(), self.mismatch
        other._open = {key: dict(by_rank) for key, by_rank in self._open.items()}
        other._recent = dict(self._recent)
        other._steps = {step: sums.copy() for step, sums in self._steps.items()}
        return other

    def add(self, message: Collectives, world_size: int) -> None:
        """Take the finished collectives of one rank."""
        self._recent[message.rank] = message
        for seq, op, nbytes, _issue_ns, _end_ns, duration_us, blocked_us in message.records:
            by_rank = self._open.setdefault((message.group, seq), {})
            by_rank[message.rank] = _Record(op, nbytes, message.step, duration_us, blocked_us)
            if world_size > 1 and len(by_rank) == world_size:
                self._close(message.group, seq, by_rank)
        while len(self._open) > OPEN_KEPT:  # telemetry may lose packets: what can't be completed must not pile up
            del self._open[next(iter(self._open))]

    def _close(self, group: str, seq: int, by_rank: dict[int, _Record]) -> None:
        del self._open[group, seq]
        last_rank = min(by_rank, key=lambda rank: by_rank[rank].duration_us)
        op, nbytes, step, transfer_us, _ = by_rank[last_rank]
        if any((record.op, record.bytes) != (op, nbytes) for record in by_rank.values()):
            self.mismatch = Mismatch(seq, {rank: (one.op, one.bytes) for rank, one in sorted(by_rank.items())})
            return
        usual_us = self.bandwidth.add(op, nbytes, transfer_us)
        waited = {rank: record.duration_us - transfer_us for rank, record in by_rank.items()}
        exposed_us = sum(record.blocked_us for record in by_rank.values()) / len(by_rank)
        meeting = Meeting(seq, op, nbytes, step, transfer_us, last_rank, waited, exposed_us)
        self.meetings.append(meeting)
        sums = self._sums(step)
        sums.meetings += 1
        if usual_us is not None:
            sums.excess_us += transfer_us - usual_us
            sums.compared += 1
        for rank, waited_us in waited.items():
            sums.waited_us[rank] = sums.waited_us.get(rank, 0) + waited_us
            sums.blocked_us[rank] = sums.blocked_us.get(rank, 0) + min(waited_us, by_rank[rank].blocked_us)
        sums.caused_us[last_rank] = sums.caused_us.get(last_rank, 0) + sum(waited.values())
        if meeting.skew_us >= MIN_SKEW_US:
            sums.came_last[last_rank] = sums.came_last.get(last_rank, 0) + 1

    def _sums(self, step: int) -> _Step:
        sums = self._steps.setdefault(step, _Step())
        while len(self._steps) > HISTORY_STEPS:
            del self._steps[min(self._steps)]
        return sums

    def step_took(self, step: int, step_ms: float) -> None:
        """A rank's time for `step`: shares of waiting are relative to it."""
        sums = self._sums(step)
        sums.step_ms = max(sums.step_ms, step_ms)

    def messages(self) -> list[Collectives]:
        """The newest message of each rank."""
        return list(self._recent.values())

    def window(self, steps: int = WINDOW_STEPS) -> WaitWindow:
        """The newest `steps` steps with collectives, without the very newest: it is still being reported, and half
        of its collectives would look like half of the waiting."""
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        chosen = [self._steps[step] for step in met]
        waited_us: dict[int, int] = {}
        blocked_us: dict[int, int] = {}
        caused_us: dict[int, int] = {}
        came_last: dict[int, int] = {}
        for sums in chosen:
            for total, part in (
                (waited_us, sums.waited_us),
                (blocked_us, sums.blocked_us),
                (caused_us, sums.caused_us),
                (came_last, sums.came_last),
            ):
                for rank, value in part.items():
                    total[rank] = total.get(rank, 0) + value
        timed = [sums.step_ms for sums in chosen if sums.step_ms]
        count, others = max(1, len(chosen)), max(1, len(waited_us) - 1)
        return WaitWindow(
            len(chosen),
            sum(timed) / len(timed) if timed else 0.0,
            {rank: value / 1000 / count for rank, value in waited_us.items()},
            {rank: value / 1000 / count for rank, value in blocked_us.items()},
            {rank: value / 1000 / count / others for rank, value in caused_us.items()},
            came_last,
        )

    def lateness_ms(self, steps: int = HISTORY_STEPS) -> dict[int, dict[int, float]]:
        """Step -> rank -> what each other rank waited for it in that step, on average, in ms; the newest `steps` steps
        without the very newest, which is still being reported."""
        return self._per_rank(steps, lambda sums: sums.caused_us, shared=True)

    def waiting_ms(self, steps: int = HISTORY_STEPS) -> dict[int, dict[int, float]]:
        """The same: what the rank waited for others."""
        return self._per_rank(steps, lambda sums: sums.waited_us, shared=False)

    def _per_rank(
        self, steps: int, part: Callable[[_Step], dict[int, int]], shared: bool
    ) -> dict[int, dict[int, float]]:
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        found = {}
        for step in met:
            sums = self._steps[step]
            others = max(1, len(sums.waited_us) - 1) if shared else 1
            found[step] = {rank: part(sums).get(rank, 0) / 1000 / others for rank in sums.waited_us}
        return found

    def step_ms(self) -> dict[int, float]:
        """Step -> the time that it took on the slowest rank."""
        return {step: sums.step_ms for step, sums in self._steps.items() if sums.step_ms}

    def net_cost_ms(self, steps: int = STEPS_KEPT) -> dict[int, list[float]]:
        """Rank -> for each of the newest `steps` steps, oldest first, without the very newest: what each other rank
        waited for this one on average, minus what was waited for the others. If ranks take turns this is about zero,
        however long they wait."""
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        ranks = {rank for step in met for rank in self._steps[step].waited_us}
        others = max(1, len(ranks) - 1)
        costs: dict[int, list[float]] = {rank: [] for rank in sorted(ranks)}
        for step in met:
            caused = self._steps[step].caused_us
            total = sum(caused.values())
            for rank, series in costs.items():
                own = caused.get(rank, 0)
                series.append((own - (total - own) / others) / 1000 / others)
        return costs

    def transfer_excess_ms(self, steps: int = STEPS_KEPT) -> list[float]:
        """For each of the newest `steps` steps, oldest first, without the very newest: how much longer the transfers
        took than those of the same kind did at first. Steps of which too little is known are left out."""
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        known = [self._steps[step] for step in met]
        return [sums.excess_us / 1000 for sums in known if sums.compared * 2 >= sums.meetings]
