"""What the heartbeat says of collectives on a GPU's stream, with events that are set by hand: they are reported when
the next one is issued, which may be never, and have ended long before."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from runtime.comm.pending import DeviceClock, DevicePending
from runtime.telemetry import Telemetry
from runtime.wire.messages import Heartbeat
from runtime.wire.rundir import Sockets


class Event:
    """A CUDA event."""

    happened = False

    def query(self) -> bool:
        return self.happened


class Rank:
    """Its telemetry and its clock; the collectives that it issues end when `end` says so."""

    def __init__(self) -> None:
        self.telemetry = Telemetry(rank=0, attempt=1, sockets=Sockets(Path("unused")))
        self.clock = object.__new__(DeviceClock)  # a clock makes a stream
        self.clock._unreported, self.clock._ended = deque(), 0
        self.telemetry.completed_on_device = self.clock.ended
        self.ends: list[Event] = []

    def issue(self) -> None:
        pending = object.__new__(DevicePending)
        pending.seq = self.telemetry.issued("all_gather", 1 << 20)
        pending._end, pending._wait_begun = Event(), None  # type: ignore[assignment]
        self.ends.append(pending._end)  # type: ignore[arg-type]
        self.clock._unreported.append(pending)

    def beat(self) -> tuple[int, int]:
        (beat,) = [one for one in self.telemetry._measured() if isinstance(one, Heartbeat)]
        return beat.entered_seq, beat.completed_seq


def test_a_collective_that_has_ended_is_complete_although_no_other_follows() -> None:
    rank = Rank()
    for _ in range(3):
        rank.issue()
    assert rank.beat() == (3, 0)
    rank.ends[0].happened = rank.ends[1].happened = True
    assert rank.beat() == (3, 2)
    rank.ends[2].happened = True
    assert rank.beat() == (3, 3)


def test_completion_is_progress() -> None:
    rank = Rank()
    rank.issue()
    (before,) = [one for one in rank.telemetry._measured() if isinstance(one, Heartbeat)]
    rank.ends[0].happened = True
    (after,) = [one for one in rank.telemetry._measured() if isinstance(one, Heartbeat)]
    assert after.progress_ns > before.progress_ns
    (later,) = [one for one in rank.telemetry._measured() if isinstance(one, Heartbeat)]
    assert later.progress_ns == after.progress_ns


def test_the_number_never_falls() -> None:
    """Reported collectives leave the clock; those of the host's groups are counted by the same numbers."""
    rank = Rank()
    rank.issue()
    rank.ends[0].happened = True
    assert rank.beat() == (1, 1)
    rank.clock._unreported.clear()
    assert rank.beat() == (1, 1)
