"""Stalls: why a run makes no progress.

Clocks of two nodes are never compared. A rank's idle time is measured by its own heartbeat (its now minus its last
progress, one clock) plus the time since that heartbeat reached the hub (the hub's clock alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.wire.messages import Heartbeat
from zerotop.format import duration_text
from zerotop.state.run import RankState, RunState

STALL_MIN_S = 10.0
STALL_STEPS = 5
"""A run is stalled after max(STALL_MIN_S, STALL_STEPS x the p99 step time) without progress."""
FIRST_STEPS = 3
"""The first steps of an attempt compile, warm up and allocate: no verdict yet."""
QUIET_PHASES = frozenset({"checkpoint", "paused", "eval", "init"})
"""While any rank is in one of these, the others may rightly stand still."""
UNCOUNTED_MIN_S = 30.0
"""The same where ranks do not report their steps: they may rightly be doing something else for a while."""
FIRST_COLLECTIVES = 20
"""And so many collectives there stand for the first steps."""


@dataclass(frozen=True)
class Stall:
    """A run without progress. `missing` have not entered collective `seq`, `waiting` are in it; both are empty if no
    collective is to blame. `ended` have left the run while the others wait in one, which cannot complete."""

    idle_s: float
    cause: str
    seq: int | None = None
    op: str = ""
    missing: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The verdict in one line."""
        return f"no progress for {duration_text(self.idle_s)}: {self.cause}"


def idle_s(rank: RankState, hub_now_ns: int) -> float:
    """Seconds since the rank's training thread last did anything that telemetry sees; 0 before its first heartbeat."""
    beat = rank.heartbeat
    if beat is None:
        return 0.0
    since_heard_ns = max(0, hub_now_ns - rank.heard_ns) if rank.heard_ns else 0
    return (max(0, beat.now_ns - beat.progress_ns) + since_heard_ns) / 1e9


def is_compiling(rank: RankState) -> bool:
    """Whether torch.compile compiles on the rank, also long after its first steps."""
    return rank.heartbeat is not None and rank.heartbeat.compiling


def is_quiet(rank: RankState) -> bool:
    """Whether the others may rightly stand still because of what the rank does."""
    return rank.phase in QUIET_PHASES or is_compiling(rank)


def counts_steps(state: RunState) -> bool:
    """Whether the run's trainer reports its steps."""
    return state.hello is None or state.hello.counts_steps


def is_past(state: RunState, steps: int) -> bool:
    """Whether so many first steps of this attempt are over."""
    if counts_steps(state):
        return state.step - (state.hello.start_step if state.hello else 0) >= steps
    beats = [rank.heartbeat for rank in state.ranks.values() if rank.heartbeat is not None]
    return any(beat.completed_seq >= FIRST_COLLECTIVES for beat in beats)


def threshold_s(state: RunState) -> float:
    """Seconds without progress after which a run counts as stalled."""
    if not counts_steps(state):
        return UNCOUNTED_MIN_S
    start = state.hello.start_step if state.hello else 0
    recent = sorted(point.step_ms for point in state.series.recent(100) if point.step > start + FIRST_STEPS)
    p99_ms = recent[min(len(recent) - 1, int(len(recent) * 0.99))] if recent else 0.0
    return max(STALL_MIN_S, STALL_STEPS * p99_ms / 1000)


def find_stall(state: RunState) -> Stall | None:
    """The verdict at `state.hub_now_ns`; None if the run makes progress or may rightly stand still."""
    ranks = [rank for _, rank in sorted(state.ranks.items()) if rank.heartbeat is not None and rank.goodbye is None]
    if state.state_name not in {"running", "stopping"} or not ranks:
        return None
    if any(is_quiet(rank) for rank in ranks):
        return None
    if not is_past(state, FIRST_STEPS):
        return None
    # The most recent progress decides: if one rank still moves (reading data, say), the run is slow, not stuck.
    idle = min(idle_s(rank, state.hub_now_ns) for rank in ranks)
    if idle < STALL_MIN_S or idle < (limit := threshold_s(state)):
        return None
    stall = _blame(ranks, _finished(state), idle, state.hub_now_ns, limit)
    return stall if counts_steps(state) or stall.waiting or stall.ended else None


def explain(state: RunState, idle: float, limit: float) -> Stall | None:
    """The verdict on a run that was found without progress for `idle` seconds; a rank silent for `limit` seconds is
    named as such. None if no remaining rank has reported its position."""
    ranks = [rank for _, rank in sorted(state.ranks.items()) if rank.heartbeat is not None and rank.goodbye is None]
    return _blame(ranks, _finished(state), idle, state.hub_now_ns, limit) if ranks else None


def _finished(state: RunState) -> dict[int, int]:
    """Rank -> its last step, of those that have finished."""
    words = {number: rank.goodbye for number, rank in sorted(state.ranks.items()) if rank.goodbye is not None}
    return {number: word.step for number, word in words.items() if word.outcome == "finished"}


def _blame(ranks: list[RankState], finished: dict[int, int], idle: float, hub_now_ns: int, limit: float) -> Stall:
    beats = {rank.rank: rank.heartbeat for rank in ranks if rank.heartbeat is not None}
    silent = tuple(rank.rank for rank in ranks if rank.heard_ns and (hub_now_ns - rank.heard_ns) / 1e9 >= limit)
    tail = f"; nothing heard from {ranks_text(silent)}" if silent else ""
    # What one rank has completed, all have entered: the last heartbeat of a silent rank may be older than that.
    completed = max(beat.completed_seq for beat in beats.values())
    lowest = max(completed, min(beat.entered_seq for beat in beats.values()))
    seq = lowest + 1
    waiting = tuple(number for number, beat in beats.items() if beat.entered_seq >= seq)
    missing = tuple(number for number in beats if number not in waiting)
    if waiting:
        # Only a rank whose newest collective is this one knows its name; others (asynchronous) are further ahead.
        op = next((beat.entered_op for beat in beats.values() if beat.entered_seq == seq and beat.entered_op), "")
        text = f"{ranks_text(missing)} {_has(missing)} not entered collective {_name(seq, op)}, "
        text += f"{ranks_text(waiting)} {'waits' if len(waiting) == 1 else 'wait'} in it; "
        text += f"rank {missing[0]} is in {place_text(beats[missing[0]])}"
        return Stall(idle, text + tail, seq, op, missing, waiting, silent)
    held = tuple(number for number, beat in beats.items() if beat.completed_seq < lowest)
    if held:
        op = next((beat.entered_op for beat in beats.values() if beat.entered_op), "")
        if finished:
            text = f"{ranks_text(tuple(finished))} ended after step {min(finished.values())}, {ranks_text(held)} "
            text += f"{'waits' if len(held) == 1 else 'wait'} in collective {_name(lowest, op)}"
            return Stall(idle, text + tail, lowest, op, (), held, silent, tuple(finished))
        if len(held) == len(beats):
            text = f"all ranks have entered collective {_name(lowest, op)}, it does not complete"
        else:
            text = f"all ranks have entered collective {_name(lowest, op)}, {ranks_text(held)} {_has(held)} not left it"
        return Stall(idle, text + tail, lowest, op, (), held, silent)
    places = sorted({place_text(beat) for beat in beats.values()})
    text = f"all ranks are in {places[0]}" if len(places) == 1 else "ranks are in " + ", ".join(places)
    return Stall(idle, f"{text}, outside any collective{tail}", silent=silent)


def _name(seq: int, op: str) -> str:
    return f"{seq} ({op})" if op else str(seq)


def place_text(beat: Heartbeat) -> str:
    """'backward 3/4', 'data', 'its script' where phases are not known."""
    if beat.phase == "idle":
        return "its script"
    return f"{beat.phase} {beat.micro_step}/{beat.micro_steps}" if beat.micro_step else beat.phase


def _has(numbers: tuple[int, ...]) -> str:
    return "has" if len(numbers) == 1 else "have"


def odd_ones_out(camps: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ranks outside of the largest camp; all of them if two camps are the largest, of which neither is to blame
    more than the other."""
    ordered = sorted(camps, key=len, reverse=True)
    lone = len(ordered) > 1 and len(ordered[0]) > len(ordered[1])
    return tuple(sorted(rank for camp in ordered[lone:] for rank in camp))


def ranks_text(numbers: tuple[int, ...]) -> str:
    """'rank 3', 'ranks 0, 2', 'ranks 0-6, 9': short enough for one line at any world size."""
    parts: list[str] = []
    first = last = numbers[0]
    for number in (*numbers[1:], None):
        if number is not None and number == last + 1:
            last = number
            continue
        parts.append(str(first) if first == last else f"{first}-{last}" if last > first + 1 else f"{first}, {last}")
        if number is not None:
            first = last = number
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(parts)
