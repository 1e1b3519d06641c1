"""What is true of a run now. A status holds until somebody changes it: "running" stays there while a rank is stopped,
while nothing moves, and when the supervisor, whose word it is, is gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.wire.messages import LIVE_STATES, RunStateName
from zerotop.format import duration_text
from zerotop.state.run import RunState
from zerotop.state.stall import find_stall, ranks_text

SILENT_S = 5.0
"""A rank sends several heartbeats a second, also while its training thread is busy: after this long its process does
not run, or can't be reached."""


@dataclass(frozen=True)
class Condition:
    """`name` is the status's state where that is all there is to say; "stalled" when the ranks stand still, or one of
    them can't be heard; "unknown" when the supervisor can't."""

    name: RunStateName | Literal["stalled", "unknown"]
    text: str = ""
    """Why it is not the status's state: one line for people."""
    moving: bool = False
    """Steps are being taken, so that an ETA means something."""


def condition_of(state: RunState, connection: str = "live") -> Condition:
    """`connection` as a source tells it. Only the hub's clock is read: arrivals of packets against its newest word."""
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
    return Condition(name, moving=name == "running")


def silent_ranks(state: RunState) -> dict[int, float]:
    """Rank -> seconds, of those that the hub has not heard from for too long and that have not left."""
    silent = {}
    for number, rank in sorted(state.ranks.items()):
        if rank.hello is None or rank.heartbeat is None or rank.goodbye is not None or not rank.heard_ns:
            continue
        seconds = (state.hub_now_ns - rank.heard_ns) / 1e9
        if seconds > SILENT_S:
            silent[number] = seconds
    return silent
