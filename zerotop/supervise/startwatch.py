"""Passes on what rank 0 is doing before the ranks have introduced themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runtime.wire.startnote import read_start, start_file
from zerotop.hub.hub import Hub

LOOK_S = 0.5
STARTING = ("starting", "restarting")


class StartWatch:
    """Puts it into the run's status while the run starts."""

    def __init__(self, hub: Hub, sockets: Path) -> None:
        self._hub, self._sockets = hub, sockets

    async def watch(self) -> None:
        """Look until the run has ended."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Look once."""
        status = self._hub.status
        doing = read_start(self._sockets) if status.state in STARTING else ""
        if doing != status.doing:
            self._hub.set_status(doing=doing)

    def forget(self) -> None:
        """The ranks are started again: what the last ones did is over."""
        start_file(self._sockets).unlink(missing_ok=True)
