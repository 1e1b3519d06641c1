"""Who waits for whom, without comparing clocks.

In one collective every rank is held until the last one arrives, so the rank with the shortest duration came last, its
duration is the transfer, and what any other rank's duration has beyond that is waiting. Only durations are compared,
never times of two nodes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from runtime.wire.messages import Collectives

OPEN_KEPT = 512
VERDICTS_KEPT = 1024
MIN_SKEW_US = 200
"""Below this, who came last is noise."""


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

    @property
    def skew_us(self) -> int:
        return max(self.waited_us.values(), default=0)


class Waits:
    def __init__(self) -> None:
        self.meetings: deque[Meeting] = deque(maxlen=VERDICTS_KEPT)
        self._open: dict[
            int, dict[int, tuple[str, int, int, int]]
        ] = {}  # seq -> rank -> (op, bytes, step, duration_us)
        self._recent: dict[int, Collectives] = {}

    def restart(self) -> None:
        """A new attempt numbers its collectives from 1 again."""
        self.__init__()  # type: ignore[misc]

    def copy(self) -> Waits:
        """An independent copy: what is added to one is not seen by the other."""
        other = Waits()
        other.meetings = self.meetings.copy()
        other._open = {seq: dict(by_rank) for seq, by_rank in self._open.items()}
        other._recent = dict(self._recent)
        return other

    def add(self, message: Collectives, world_size: int) -> None:
        self._recent[message.rank] = message
        for seq, op, nbytes, _issue_ns, _end_ns, duration_us, _wait_us in message.records:
            by_rank = self._open.setdefault(seq, {})
            by_rank[message.rank] = (op, nbytes, message.step, duration_us)
            if world_size > 1 and len(by_rank) == world_size:
                self._close(seq, by_rank)
        while len(self._open) > OPEN_KEPT:  # telemetry may lose packets: what can't be completed must not pile up
            del self._open[next(iter(self._open))]

    def _close(self, seq: int, by_rank: dict[int, tuple[str, int, int, int]]) -> None:
        del self._open[seq]
        last_rank = min(by_rank, key=lambda rank: by_rank[rank][3])
        op, nbytes, step, transfer_us = by_rank[last_rank]
        waited = {rank: record[3] - transfer_us for rank, record in by_rank.items()}
        self.meetings.append(Meeting(seq, op, nbytes, step, transfer_us, last_rank, waited))

    def messages(self) -> list[Collectives]:
        return list(self._recent.values())

    def came_last(self, steps: int = 10) -> dict[int, int]:
        """Rank -> in how many of the newest `steps` steps' collectives with a skew that matters it came last."""
        if not self.meetings:
            return {}
        since = self.meetings[-1].step - steps
        counts: dict[int, int] = {}
        for meeting in self.meetings:
            if meeting.step > since and meeting.skew_us >= MIN_SKEW_US:
                counts[meeting.last_rank] = counts.get(meeting.last_rank, 0) + 1
        return counts

    def waited_ms(self, step: int) -> dict[int, float]:
        """Rank -> milliseconds it waited for others in the collectives of `step`."""
        totals: dict[int, float] = {}
        for meeting in self.meetings:
            if meeting.step == step:
                for rank, waited_us in meeting.waited_us.items():
                    totals[rank] = totals.get(rank, 0.0) + waited_us / 1000
        return totals
