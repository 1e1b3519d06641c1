"""Warns about memory before it runs out: a coming peak for which too little is free, and fragmentation. Each warning is
an event, said once."""

from __future__ import annotations

import asyncio

from zerotop.hub.hub import Hub
from zerotop.state.forecast import forecast
from zerotop.state.fragmentation import fragmentation_text

LOOK_S = 1.0
SAID_AGAIN_S = 600.0
"""Fragmentation of the same rank is reported again after this time at the earliest."""


class MemoryWatch:
    """The warnings of one run. A need is warned about again only if it has been covered in between."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._warned: set[tuple[int, str, str]] = set()
        self._retries: dict[tuple[int, int], int] = {}
        self._quiet_looks: dict[int, int] = {}

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check once."""
        self._look_ahead()
        for rank, state in sorted(self._hub.state.ranks.items()):
            if state.memory is None or state.memory.alloc_retries is None:
                continue
            key = (self._attempt, rank)
            if self._quiet_looks.get(rank, 0) > 0:
                self._quiet_looks[rank] -= 1
            else:
                text = fragmentation_text(rank, state.memory, self._retries.get(key, 0))
                if text:
                    self._quiet_looks[rank] = round(SAID_AGAIN_S / LOOK_S)
                    self._hub.event("fragmentation", text, "warning", rank=rank, retries=state.memory.alloc_retries)
            self._retries[key] = state.memory.alloc_retries

    def _look_ahead(self) -> None:
        found = {(self._attempt, need.event, need.place): need for need in forecast(self._hub.state)}
        for key, need in found.items():
            if need.short and need.certain and key not in self._warned:
                self._warned.add(key)
                data = {name: value for name, value in need.document().items() if name != "text"}
                self._hub.event("memory", need.text, "warning", **data)
            elif not need.short:
                self._warned.discard(key)

    @property
    def _attempt(self) -> int:
        return self._hub.status.attempt
