"""What a run is doing now. The status of a run changes only when somebody changes it: it stays "running" while a
rank is stopped, while nothing makes progress, and after the supervisor, who would change it, has been killed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.wire.messages import LIVE_STATES, RunStateName
from zerotop.format import duration_text
from zerotop.state.run import RankState, RunState
from zerotop.state.stall import find_stall, ranks_text

SILENT_S = 5.0
"""A rank sends several heartbeats a second, also while its training thread is busy: after this long its process is
stopped or cannot be reached."""


@dataclass(frozen=True)
class Condition:
    """`name` is the state of the status, except "stalled" when the ranks make no progress or one of them sends
    nothing, and "unknown" when the supervisor cannot be reached."""

    name: RunStateName | Literal["stalled", "unknown"]
    text: str = ""
    """Why it differs from the state of the status, in one line."""
    moving: bool = False
    """Steps are being taken, so that an ETA makes sense."""
    saving: bool = False
    """Training waits for a checkpoint."""


def condition_of(state: RunState, connection: str = "live") -> Condition:
    """`connection` is that of the source. Only the hub's clock is read: arrival times of packets against the newest
    of them."""
    name = state.status.state if state.status else "starting"
    if name not in LIVE_STATES:
        return Condition(name)
    if connection.startswith("lost"):
        why = connection.removeprefix("lost").removeprefix(": ") or "nothing is heard"
        return Condition("unknown", f"the supervisor can't be reached ({why}); the run was {name}")
    if name in ("running", "stopping", "paused"):
        if silent := silent_ranks(state):
            numbers = tuple(silent)
            return Condition(
                "stalled", f"nothing heard from {ranks_text(numbers)} for {duration_text(max(silent.values()))}"
            )
        if (stall := find_stall(state)) is not None:
            return Condition("stalled", stall.text)
    saving = name == "running" and any(rank.phase == "checkpoint" for rank in state.ranks.values())
    return Condition(name, moving=name == "running", saving=saving)


def unreported_ranks(state: RunState) -> tuple[int, ...]:
    """Ranks that have not introduced themselves; empty while nobody has, because nobody has said how many there are."""
    return tuple(rank for rank in range(state.world_size) if (r := state.ranks.get(rank)) is None or r.hello is None)


def silent_ranks(state: RunState) -> dict[int, float]:
    """Rank -> seconds since its last message, for ranks that have been silent for too long and have not left."""
    silent = {}
    trains = any(rank.step is not None for rank in state.ranks.values())
    since_ns = state.hub_now_ns - int(SILENT_S * 1e9)
    for number, rank in sorted(state.ranks.items()):
        if rank.heard_ns >= since_ns or not rank.heard_ns:  # nearly always, and this is asked at every tick
            continue
        begun = rank.heartbeat is not None or trains
        if rank.hello is not None and begun and rank.goodbye is None:
            silent[number] = silent_s(rank, state.hub_now_ns)
    return silent


def silent_s(rank: RankState, hub_now_ns: int) -> float:
    """Seconds since the hub heard from the rank; 0 before its first packet."""
    return max(0, hub_now_ns - rank.heard_ns) / 1e9 if rank.heard_ns else 0.0
