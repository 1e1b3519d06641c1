"""Where the time of the recent steps went, as one message for screens and commands that come late: what it is computed
from is more than a snapshot can carry."""

from __future__ import annotations

import math

from runtime.wire.judgement import TimeReport, TransferKind
from zerotop.state.bandwidth import Transfers
from zerotop.state.breakdown import RECENT_STEPS
from zerotop.state.run import RunState
from zerotop.state.waits import BUS_OF

TRANSFERS_TOLD = 32


def time_report(state: RunState) -> TimeReport | None:
    """The report on the recent steps; None before the first."""
    window = state.waits.window()
    found = state.breakdowns.recent(window.waited_ms)
    if not found:
        return None
    world = state.world_size
    return TimeReport(
        steps=window.steps or min(RECENT_STEPS, max(state.breakdowns.steps(rank) for rank in found)),
        parts_ms={rank: {part: round(ms, 3) for part, ms in one.parts().items()} for rank, one in found.items()},
        meetings=min(BUS_OF, len(state.waits.meetings)),
        bus_bytes_per_s=state.waits.bus_bytes_per_s(world),
        transfers=[_told(kind, world) for kind in state.waits.bandwidth.kinds()[:TRANSFERS_TOLD]],
    )


def _told(kind: Transfers, world: int) -> TransferKind:
    best_us = kind.best_us if math.isfinite(kind.best_us) else None
    return TransferKind(
        op=kind.op,
        bytes=kind.bytes,
        group=kind.group,
        count=kind.count,
        first_us=kind.usual_us,
        now_us=kind.now_us,
        best_us=best_us,
        bus_bytes_per_s=kind.bus_bytes_per_s(kind.now_us, world),
        best_bus_bytes_per_s=kind.bus_bytes_per_s(best_us, world),
    )
