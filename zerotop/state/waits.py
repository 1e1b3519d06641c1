"""Which rank waits for which, without comparing clocks.

In a collective every rank is held until the last one arrives. So the rank with the shortest duration came last, its
duration is the transfer, and the rest of any other rank's duration is waiting. Only durations are compared, never times
of two nodes.

What that costs a step is at most the time for which the rank's training thread was blocked in it: collectives overlap
with compute, and the wait is over where the result is needed. It may be needed in a later collective than the one that
a rank was late for, so both are compared over a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from runtime.wire.messages import Collectives
from zerotop.state.bandwidth import Bandwidth, Transfers, bus_factor

OPEN_KEPT = 512
VERDICTS_KEPT = 1024
BUS_OF = 200
"""Collectives that the bus bandwidth of a run is over."""
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
    """One collective that all ranks have reported. `seq` counts within its process group. `waited_us`: rank -> for how
    long it was in it before the last one came, also where that cost nothing."""

    group: str
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
    waited_us: dict[int, dict[int, int]] = field(default_factory=dict)
    """Rank that came last -> rank -> how long that rank was in a collective before."""
    blocked_us: dict[int, int] = field(default_factory=dict)
    """Rank -> for how long its training thread was blocked in collectives."""
    excess_us: float = 0.0
    """How much longer the transfers took than those of these kinds usually take."""
    compared: int = 0
    """Collectives of which the usual time is known."""
    came_last: dict[int, int] = field(default_factory=dict)
    step_ms: float = 0.0
    _costs_us: tuple[dict[int, float], dict[int, float]] | None = None
    """What `costs_us` has found, until there is another collective."""

    def copy(self) -> _Step:
        return replace(
            self,
            waited_us={last: dict(waits) for last, waits in self.waited_us.items()},
            blocked_us=dict(self.blocked_us),
            came_last=dict(self.came_last),
        )

    def costs_us(self) -> tuple[dict[int, float], dict[int, float]]:
        """(rank -> for how long its training thread waited for others, rank -> how long all others together did for
        it)."""
        if self._costs_us is None:
            self._costs_us = self._find_costs_us()
        return self._costs_us

    def add(self, last_rank: int, waited_us: dict[int, int], blocked_us: dict[int, int]) -> None:
        """Take a collective: rank -> how long it was in it before `last_rank` came, and for how long it was blocked."""
        self.meetings += 1
        _add(self.waited_us.setdefault(last_rank, {}), waited_us)
        _add(self.blocked_us, blocked_us)
        self._costs_us = None

    def exposed_transfer_us(self) -> float:
        """For how long training threads were blocked by transfers, without waiting for peers: the mean over the
        ranks."""
        waited = self.costs_us()[0]
        exposed = [max(0.0, blocked - waited.get(rank, 0.0)) for rank, blocked in self.blocked_us.items()]
        return sum(exposed) / len(exposed) if exposed else 0.0

    def _find_costs_us(self) -> tuple[dict[int, float], dict[int, float]]:
        total: dict[int, int] = {}
        for waits in self.waited_us.values():
            for rank, waited_us in waits.items():
                total[rank] = total.get(rank, 0) + waited_us
        felt = {rank: min(1.0, self.blocked_us[rank] / waited) if waited else 0.0 for rank, waited in total.items()}
        caused = {
            last: sum(felt[rank] * waited_us for rank, waited_us in waits.items())
            for last, waits in self.waited_us.items()
        }
        return {rank: felt[rank] * waited for rank, waited in total.items()}, caused


@dataclass(frozen=True)
class WaitWindow:
    """Waiting over the newest finished steps that had collectives; all dicts by rank, empty before the first."""

    steps: int
    step_ms: float  # mean of the same steps, of the slowest rank in each; 0 while none has reported
    waited_ms: dict[int, float]  # per step: for how long the rank's training thread waited for others
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
        self._windows: dict[int, WaitWindow] = {}
        """Steps -> what `window` has found, until something else is added."""
        self._exposed = Transfers("step", 0, "")
        """The exposed transfer of the steps whose sums are no longer kept: each step counts as one transfer."""

    def copy(self) -> Waits:
        """An independent copy."""
        other = Waits()
        other.meetings = self.meetings.copy()
        other.bandwidth, other.mismatch = self.bandwidth.copy(), self.mismatch
        other._open = {key: dict(by_rank) for key, by_rank in self._open.items()}
        other._recent = dict(self._recent)
        other._exposed = self._exposed.copy()
        other._steps = {step: sums.copy() for step, sums in self._steps.items()}
        return other

    def add(self, message: Collectives, world_size: int) -> None:
        """Take the finished collectives of one rank."""
        self._windows.clear()
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
        usual_us = self.bandwidth.add(op, nbytes, transfer_us, group)
        waited = {rank: record.duration_us - transfer_us for rank, record in by_rank.items()}
        exposed_us = sum(record.blocked_us for record in by_rank.values()) / len(by_rank)
        meeting = Meeting(group, seq, op, nbytes, step, transfer_us, last_rank, waited, exposed_us)
        self.meetings.append(meeting)
        sums = self._sums(step)
        sums.add(last_rank, waited, {rank: record.blocked_us for rank, record in by_rank.items()})
        if usual_us is not None:
            sums.excess_us += transfer_us - usual_us
            sums.compared += 1
        if meeting.skew_us >= MIN_SKEW_US:
            sums.came_last[last_rank] = sums.came_last.get(last_rank, 0) + 1

    def _sums(self, step: int) -> _Step:
        sums = self._steps.setdefault(step, _Step())
        while len(self._steps) > HISTORY_STEPS:
            oldest = self._steps.pop(min(self._steps))
            if oldest.meetings:
                self._exposed.add(round(oldest.exposed_transfer_us()))
        return sums

    def step_took(self, step: int, step_ms: float) -> None:
        """A rank's time for `step`: shares of waiting are relative to it."""
        self._windows.clear()
        sums = self._sums(step)
        sums.step_ms = max(sums.step_ms, step_ms)

    @property
    def groups(self) -> set[str]:
        """The process groups of the newest collectives."""
        return {meeting.group for meeting in self.meetings}

    def bus_bytes_per_s(self, world_size: int) -> float | None:
        """Bus bandwidth over the newest BUS_OF collectives that all ranks have reported; None before the first."""
        newest = list(self.meetings)[-BUS_OF:]
        seconds = sum(meeting.transfer_us for meeting in newest) / 1e6
        moved = sum(meeting.bytes * bus_factor(meeting.op, world_size) for meeting in newest)
        return moved / seconds if seconds > 0 and moved > 0 else None

    def messages(self) -> list[Collectives]:
        """The newest message of each rank."""
        return list(self._recent.values())

    def window(self, steps: int = WINDOW_STEPS) -> WaitWindow:
        """The newest `steps` steps with collectives, without the very newest: it is still being reported, and half
        of its collectives would look like half of the waiting."""
        if steps not in self._windows:
            self._windows[steps] = self._find_window(steps)
        return self._windows[steps]

    def _find_window(self, steps: int) -> WaitWindow:
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        chosen = [self._steps[step] for step in met]
        waited_us: dict[int, float] = {}
        caused_us: dict[int, float] = {}
        came_last: dict[int, int] = {}
        for sums in chosen:
            waited, caused = sums.costs_us()
            _add(waited_us, waited)
            _add(caused_us, caused)
            _add(came_last, sums.came_last)
        timed = [sums.step_ms for sums in chosen if sums.step_ms]
        count, others = max(1, len(chosen)), max(1, len(waited_us) - 1)
        return WaitWindow(
            len(chosen),
            sum(timed) / len(timed) if timed else 0.0,
            {rank: value / 1000 / count for rank, value in waited_us.items()},
            {rank: value / 1000 / count / others for rank, value in caused_us.items()},
            came_last,
        )

    def lateness_ms(self, steps: int = HISTORY_STEPS) -> dict[int, dict[int, float]]:
        """Step -> rank -> what each other rank waited for it in that step, on average, in ms; the newest `steps` steps
        without the very newest, which is still being reported."""
        return self._per_rank(steps, lambda sums: sums.costs_us()[1], shared=True)

    def waiting_ms(self, steps: int = HISTORY_STEPS) -> dict[int, dict[int, float]]:
        """The same: what the rank waited for others."""
        return self._per_rank(steps, lambda sums: sums.costs_us()[0], shared=False)

    def _per_rank(
        self, steps: int, part: Callable[[_Step], dict[int, float]], shared: bool
    ) -> dict[int, dict[int, float]]:
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        found = {}
        for step in met:
            sums = self._steps[step]
            others, of_step = max(1, len(sums.blocked_us) - 1) if shared else 1, part(sums)
            found[step] = {rank: of_step.get(rank, 0.0) / 1000 / others for rank in sums.blocked_us}
        return found

    def step_ms(self) -> dict[int, float]:
        """Step -> the time that it took on the slowest rank."""
        return {step: sums.step_ms for step, sums in self._steps.items() if sums.step_ms}

    def net_cost_ms(self, steps: int = STEPS_KEPT) -> dict[int, list[float]]:
        """Rank -> for each of the newest `steps` steps, oldest first, without the very newest: what each other rank
        waited for this one on average, minus what was waited for the others. If ranks take turns this is about zero,
        however long they wait."""
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1][-steps:]
        ranks = {rank for step in met for rank in self._steps[step].blocked_us}
        others = max(1, len(ranks) - 1)
        costs: dict[int, list[float]] = {rank: [] for rank in sorted(ranks)}
        for step in met:
            _, caused = self._steps[step].costs_us()
            total = sum(caused.values())
            for rank, series in costs.items():
                own = caused.get(rank, 0.0)
                series.append((own - (total - own) / others) / 1000 / others)
        return costs

    def transfer_excess_ms(self, steps: int = STEPS_KEPT) -> list[float]:
        """For each of the newest `steps` steps, oldest first, without the very newest: how much longer the transfers
        took than those of the same kind did at first. What computing hides of that costs a step nothing: it is at most
        the time for which the training threads are blocked by transfers longer than they were at first. Steps of which
        too little is known are left out."""
        met = sorted(step for step, sums in self._steps.items() if sums.meetings)[:-1]
        usual_us = self._usual_exposed_us(met)
        known = [sums for step in met[-steps:] if (sums := self._steps[step]).compared * 2 >= sums.meetings]
        return [min(sums.excess_us, max(0.0, sums.exposed_transfer_us() - usual_us)) / 1000 for sums in known]

    def _usual_exposed_us(self, met: list[int]) -> float:
        """The exposed transfer that a step had at first; 0 while too few steps are known."""
        exposed = self._exposed.copy()
        for step in met:
            exposed.add(round(self._steps[step].exposed_transfer_us()))
        return exposed.usual_us or 0.0


_Number = TypeVar("_Number", int, float)


def _add(sums: dict[int, _Number], more: dict[int, _Number]) -> None:
    for rank, value in more.items():
        sums[rank] = sums.get(rank, 0) + value
