"""The rank that the others wait for. The verdict is kept in the run's status, so that a screen opened later shows it
too, and an event reports each change."""

from __future__ import annotations

import asyncio

from zerotop.hub.hub import Hub
from zerotop.state.stall import find_laggard

LOOK_S = 1.0
SAYS_AGAIN_SHARE = 0.25
"""A verdict on the same rank is published again when its cost has changed by this share, not every second."""


class LaggardWatch:
    """Finds the slow rank of the run behind `hub` and keeps the verdict in the run's status."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._told_ms = 0.0

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check once. The verdict changes only while the run is running; a pause or a stop keeps it, and a restart
        drops it."""
        hub = self._hub
        before = hub.status.laggard_rank
        if hub.status.state != "running":
            if before is not None and hub.status.state not in ("paused", "stopping"):
                hub.set_status(laggard_rank=None, laggard="")
            return
        found = find_laggard(hub.state, before)
        rank = found.rank if found is not None else None
        if found is None:
            if before is not None:
                hub.set_status(laggard_rank=None, laggard="")
                hub.event("laggard", f"rank {before} no longer holds the others up")
            return
        wait_ms = found.others_wait_ms
        if rank == before and abs(wait_ms - self._told_ms) <= SAYS_AGAIN_SHARE * self._told_ms:
            return
        self._told_ms = wait_ms
        hub.set_status(laggard_rank=rank, laggard=found.text)
        if rank != before:
            hub.event("laggard", found.text, "warning", laggard=rank, others_wait_ms=round(wait_ms, 1))
