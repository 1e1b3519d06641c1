"""A finished run as a source: its recording, folded once."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from runtime.wire.messages import Ack, Command, CommandRecord, RunStatus
from zerotop.source.base import SourceError
from zerotop.state.run import RunState


class RecordedSource:
    """The last state of a run that has ended. `status` is the run directory's word and wins over the recording's."""

    connection = "ended"
    can_control = False

    def __init__(self, run_path: Path, status: RunStatus) -> None:
        self.state = RunState()
        self.run_path = run_path
        self._status = status
        self._changed = False

    def start(self) -> None:
        from zerotop.hub.recorder import read_messages

        try:
            self.state.apply_all(read_messages(self.run_path), 0)
        except (sqlite3.Error, OSError) as error:
            raise SourceError(f"can't read the recording in {self.run_path}: {error}") from None
        self.state.apply(self._status)
        self._changed = True

    def poll(self) -> bool:
        changed, self._changed = self._changed, False
        return changed

    def wait(self, timeout_s: float) -> None:
        time.sleep(timeout_s)  # nothing will ever arrive

    def send(self, command: Command) -> None:
        reason = f"{self._status.name} has ended ({self._status.state})"
        ack = Ack(id=command.id, state="rejected", reason=reason, wall_s=time.time())
        self.state.apply(CommandRecord(command=command, ack=ack))
        self._changed = True

    def age_s(self) -> float | None:
        return None

    def close(self) -> None:
        """Nothing is held open."""
