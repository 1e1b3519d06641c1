"""Watches for the removal of the run directory: without it a run would continue for days, in no list, and save
nothing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path

from runtime.process.atomic_file import replace_text
from runtime.wire.messages import Command
from runtime.wire.rundir import RunFile, write_json
from zerotop.hub.hub import Hub
from zerotop.rundir.paths import RunError, error_text, make_private_folder
from zerotop.rundir.statusfile import write_status

LOOK_S = 1.0
WHO = "the supervisor"


class FolderWatch:
    """Creates the directory again, so that the run can be seen and stopped, and stops the run after a checkpoint."""

    def __init__(self, path: Path, hub: Hub, run: Callable[[], RunFile]) -> None:
        """Read the files that a new directory needs. `run()` returns the current content of run.json."""
        self._path = path
        self._hub = hub
        self._run = run
        self._kept = {name: (path / name).read_text() for name in ("config.json", "resolved.json")}
        self._missing = False

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check once. The directory is created again when it is missing twice in a row: the first time, the removal
        may not be over."""
        before, self._missing = self._missing, not (self._path / "run.json").exists()
        if before and self._missing:
            self._missing = False
            self._restore()

    def _restore(self) -> None:
        run = self._run()
        text = f"the run directory {self._path} was removed, with its logs, recording and checkpoints"
        try:
            make_private_folder(self._path)
            make_private_folder(self._path / "logs")
            make_private_folder(self._path / "logs" / str(run.attempt))
            for name, content in self._kept.items():
                replace_text(self._path / name, content)
            write_json(self._path / "run.json", run)
            write_status(self._path, self._hub.status)
            text += "; it was created again, and the run stops after a checkpoint"
        except (OSError, RunError) as error:
            reason = error_text(error) if isinstance(error, OSError) else str(error)
            text += f", and can't be created again ({reason}); the run stops"
        self._hub.event("run directory", text, "error")
        self._hub.command(Command(id=uuid.uuid4().hex, name="stop", who=WHO))
        if self._hub.status.state == "stopping":
            self._hub.set_status(reason=text)
