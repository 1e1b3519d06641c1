"""Verdicts on a run that stands still, and on the rank that the others wait for.

Nothing here compares clocks of two nodes. A rank's idle time is measured by its own heartbeat (its now minus its last
progress, one clock), plus how long ago that heartbeat reached the hub (the hub's clock alone).
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.wire.messages import Heartbeat
from zerotop.state.run import RankState, RunState

STALL_MIN_S = 10.0
STALL_STEPS = 5
"""A run stalls when nothing has moved for max(STALL_MIN_S, STALL_STEPS x the p99 step time)."""
FIRST_STEPS = 3
"""The first steps of an attempt compile, warm up and allocate: no verdict yet."""
QUIET_PHASES = frozenset({"checkpoint", "paused", "eval", "init"})
"""While any rank is in one of these, the others may rightly stand still."""
LAGGARD_MEETINGS = 5
LAGGARD_SHARE = 0.7
LAGGARD_WAIT_SHARE = 0.05
"""A rank is named above both: its share of last places, and the others' wait for it as a share of the step."""
TWO_RANKS_SHARE = 0.9
"""Of two ranks one always comes last in at least half: twice its fair share would be everything."""
STILL_SHARE = 0.8
"""A rank that is named stays so down to this part of both thresholds: a verdict must not come and go at every step."""


@dataclass(frozen=True)
class Stall:
    """A run without progress. `missing` have not entered collective `seq`, `waiting` are in it; both empty when no
    collective is to blame."""

    idle_s: float
    cause: str
    seq: int | None = None
    op: str = ""
    missing: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return f"no progress for {self.idle_s:.0f} s: {self.cause}"


@dataclass(frozen=True)
class Laggard:
    """The rank that came last in most of the recent collectives, and what that cost the others."""

    rank: int
    share: float  # 0..1, of the collectives whose skew matters
    others_wait_ms: float  # per step, for this rank, mean over the other ranks
    text: str


def idle_s(rank: RankState, hub_now_ns: int) -> float:
    """Seconds since the rank's training thread last did anything that telemetry sees; 0 before its first heartbeat."""
    beat = rank.heartbeat
    if beat is None:
        return 0.0
    since_heard_ns = max(0, hub_now_ns - rank.heard_ns) if rank.heard_ns else 0
    return (max(0, beat.now_ns - beat.progress_ns) + since_heard_ns) / 1e9


def threshold_s(state: RunState) -> float:
    """Seconds without progress from which a run counts as stalled."""
    recent = sorted(state.series.recent_step_ms(100))
    p99_ms = recent[min(len(recent) - 1, int(len(recent) * 0.99))] if recent else 0.0
    return max(STALL_MIN_S, STALL_STEPS * p99_ms / 1000)


def find_stall(state: RunState) -> Stall | None:
    """The verdict at `state.hub_now_ns`, or None when the run moves or has a good reason not to."""
    ranks = [rank for _, rank in sorted(state.ranks.items()) if rank.heartbeat is not None and rank.goodbye is None]
    if state.state_name not in {"running", "stopping"} or not ranks:
        return None
    if any(rank.phase in QUIET_PHASES for rank in ranks):
        return None
    start = state.hello.start_step if state.hello else 0
    if state.step - start < FIRST_STEPS:
        return None
    limit = threshold_s(state)
    # The liveliest rank decides: one that still moves (reading data, say) is slow, not stuck.
    idle = min(idle_s(rank, state.hub_now_ns) for rank in ranks)
    if idle < limit:
        return None
    return _blame(ranks, idle, state.hub_now_ns, limit)


def explain(state: RunState, idle: float, limit: float) -> Stall | None:
    """The verdict on a run that somebody else found standing still for `idle` s; a rank not heard from for `limit` s is
    silent. None when no rank that is still there has said where it is."""
    ranks = [rank for _, rank in sorted(state.ranks.items()) if rank.heartbeat is not None and rank.goodbye is None]
    return _blame(ranks, idle, state.hub_now_ns, limit) if ranks else None


def _blame(ranks: list[RankState], idle: float, hub_now_ns: int, limit: float) -> Stall:
    beats = {rank.rank: rank.heartbeat for rank in ranks if rank.heartbeat is not None}
    silent = tuple(rank.rank for rank in ranks if rank.heard_ns and (hub_now_ns - rank.heard_ns) / 1e9 >= limit)
    tail = f"; nothing heard from {ranks_text(silent)}" if silent else ""
    # What one rank has completed, all have entered: the last word of a rank that fell silent may be older than that.
    completed = max(beat.completed_seq for beat in beats.values())
    lowest = max(completed, min(beat.entered_seq for beat in beats.values()))
    seq = lowest + 1
    waiting = tuple(number for number, beat in beats.items() if beat.entered_seq >= seq)
    missing = tuple(number for number in beats if number not in waiting)
    if waiting:
        # Only a rank whose newest collective is this very one tells its name; those further ahead (asynchronous) have
        # moved on.
        op = next((beat.entered_op for beat in beats.values() if beat.entered_seq == seq and beat.entered_op), "")
        text = f"{ranks_text(missing)} {_has(missing)} not entered collective {_name(seq, op)}, "
        text += f"{ranks_text(waiting)} {'waits' if len(waiting) == 1 else 'wait'} in it; "
        text += f"rank {missing[0]} is in {place_text(beats[missing[0]])}"
        return Stall(idle, text + tail, seq, op, missing, waiting, silent)
    held = tuple(number for number, beat in beats.items() if beat.completed_seq < lowest)
    if held:
        op = next((beat.entered_op for beat in beats.values() if beat.entered_op), "")
        if len(held) == len(beats):
            text = f"all ranks have entered collective {_name(lowest, op)}, it does not complete"
        else:
            text = f"all ranks have entered collective {_name(lowest, op)}, {ranks_text(held)} {_has(held)} not left it"
        return Stall(idle, text + tail, lowest, op, (), held, silent)
    places = sorted({place_text(beat) for beat in beats.values()})
    text = f"all ranks are in {places[0]}" if len(places) == 1 else "ranks are in " + ", ".join(places)
    return Stall(idle, f"{text}, outside any collective{tail}", silent=silent)


def find_laggard(state: RunState, named: int | None = None) -> Laggard | None:
    """The rank that the others waited for in the last WINDOW_STEPS steps; None when the last place goes round or costs
    little. `named`: the rank that the verdict before this one named, which goes only well below the thresholds.

    It reads the same window as the table of ranks, so the two can't disagree: a rank is only named when it also costs
    the others more than any other rank does.
    """
    window = state.waits.window()
    if sum(window.came_last.values()) < LAGGARD_MEETINGS or not window.step_ms:
        return None
    shares = window.came_last_share
    rank = max(shares, key=lambda number: shares[number])
    share, wait_ms = shares[rank], window.caused_ms.get(rank, 0.0)
    part = STILL_SHARE if rank == named else 1.0
    if share <= part * _laggard_share(len(window.waited_ms)) or wait_ms < max(window.caused_ms.values()):
        return None
    if wait_ms <= part * LAGGARD_WAIT_SHARE * window.step_ms:
        return None
    text = (
        f"rank {rank} came last in {share:.0%} of collectives; "
        f"others wait {wait_ms:.0f} ms a step ({wait_ms / window.step_ms:.0%})"
    )
    return Laggard(rank, share, wait_ms, text)


def _laggard_share(world_size: int) -> float:
    return max(LAGGARD_SHARE, min(TWO_RANKS_SHARE, 2 / max(1, world_size)))


def _name(seq: int, op: str) -> str:
    return f"{seq} ({op})" if op else str(seq)


def place_text(beat: Heartbeat) -> str:
    """'backward 3/4', 'data'."""
    return f"{beat.phase} {beat.micro_step}/{beat.micro_steps}" if beat.micro_step else beat.phase


def _has(numbers: tuple[int, ...]) -> str:
    return "has" if len(numbers) == 1 else "have"


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
