"""Events for what is out of order about the GPUs of the run: throttled, memory errors, a degraded link, lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from zerotop.hub.hub import Hub
from zerotop.state.gpu import Concern, concerns
from zerotop.state.memory import gpu_of

LOOK_S = 1.0
BEGINS_S = 5.0
"""How long something must last before it is reported, unless it is an error."""
ENDS_S = 30.0
"""How long it must be gone before that is reported: a GPU at its limit throttles on and off."""


class GpuAlarms:
    """Reports each concern of a rank's GPU when it begins and when it is over."""

    def __init__(self, hub: Hub, clock: Callable[[], float] = time.monotonic) -> None:
        self._hub = hub
        self._clock = clock
        self._since: dict[tuple[int, str], float] = {}
        """(rank, word) -> since when it is seen without a break."""
        self._told: dict[tuple[int, str], float] = {}
        """(rank, word) of what was reported -> when it was seen last."""

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check once."""
        now = self._clock()
        seen: dict[tuple[int, str], Concern] = {
            (rank, concern.word): concern
            for rank, those in concerns(self._hub.state).items()
            for concern in those
            if not concern.word.startswith("XID ")  # has an event of its own
        }
        self._since = {key: self._since.get(key, now) for key in seen}
        for key, concern in seen.items():
            if key in self._told:
                self._told[key] = now
            elif concern.severity == "error" or now - self._since[key] >= BEGINS_S:
                self._told[key] = now
                rank, word = key
                text = f"{self._name(rank)}: {concern.text}"
                self._hub.event("gpu", text, concern.severity, gpu_rank=rank, concern=word)
        for key, last in list(self._told.items()):
            if now - last >= ENDS_S:
                del self._told[key]
                rank, word = key
                self._hub.event("gpu", f"{self._name(rank)}: no longer {word}", gpu_rank=rank, concern=word)

    def _name(self, number: int) -> str:
        state = self._hub.state
        rank = state.ranks.get(number)
        gpu = gpu_of(state, rank) if rank is not None else None
        where = f" on {rank.hello.host}" if rank and rank.hello and len(state.nodes) > 1 else ""
        return f"GPU {gpu.index}{where} (rank {number})" if gpu is not None else f"the GPU of rank {number}{where}"
