"""A run that has ended as a source: nothing arrives any more, and commands are rejected."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from runtime.wire.messages import Ack, Command, CommandRecord, RunStatus, Snapshot
from zerotop.source.base import SourceError
from zerotop.state.run import RunState

FOLD_ROWS = 50_000
"""A recording of more rows is not folded from its beginning, which would take seconds."""


class EndedSource:
    """The last state of a run. `status` is the one in the run directory, which takes precedence."""

    connection = "ended"
    can_control = False
    run_path: Path | None = None

    def __init__(self, state: RunState, status: RunStatus) -> None:
        self.state = state
        self._status = status
        self._changed = False

    def start(self) -> None:
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


class RecordedSource(EndedSource):
    """The last state of a run, read from the recording in its directory."""

    run_path: Path

    def __init__(self, run_path: Path, status: RunStatus) -> None:
        super().__init__(RunState(), status)
        self.run_path = run_path

    def start(self) -> None:
        from zerotop.hub.recorder import read_messages
        from zerotop.recording.playback import Playback

        try:
            with Playback(self.run_path) as playback:
                long = playback.rows > FOLD_ROWS
                if long:
                    self.state = playback.state_at(playback.frames.count - 1)
            if not long:
                self.state.apply_all(read_messages(self.run_path), 0)
        except FileNotFoundError:
            pass  # a launch that was interrupted: the status alone is known
        except (sqlite3.Error, OSError) as error:
            raise SourceError(f"can't read the recording in {self.run_path}: {error}") from None
        super().start()

    def snapshot(self) -> Snapshot:
        """The whole state, for a screen on another machine."""
        return Snapshot(hub_seq=0, now_ns=0, wall_s=time.time(), messages=self.state.snapshot_messages())
