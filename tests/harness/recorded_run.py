"""A recorded run as a source for the screen, as it was at one of its steps.

python -m tests.harness.recorded_run RUN_FOLDER OUT.jsonl.gz      packs the recording of a run for the tests
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from runtime.wire.codec import decode_up, encode
from runtime.wire.messages import Collectives, Command, Heartbeat, Phases, StepResult
from zerotop.hub.recorder import read_recording
from zerotop.hub.timeline import open_recording, read_rows
from zerotop.state.run import RunState

FOLDER = Path(__file__).parents[1] / "data" / "recordings"


class Row(NamedTuple):
    """A message, and when the hub received it."""

    wall_s: float
    body: bytes


def pack(run: Path, out: Path) -> int:
    """Write the messages of a run in the order in which they came. Phases and collectives come from the timeline, which
    has all of them. Returns how many messages there are."""
    rows = [
        Row(row.wall_s, encode(row.message))
        for row in read_recording(run)
        if not isinstance(row.message, Phases | Collectives)
    ]
    with closing(open_recording(run)) as database:
        for (source,) in database.execute("SELECT DISTINCT source FROM timeline").fetchall():
            for timeline in read_rows(database, source):
                rows += [Row(timeline.last_wall_s, json.dumps(one).encode()) for one in timeline.messages]
    rows.sort(key=lambda row: row.wall_s)
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        for row in rows:
            file.write(json.dumps({"wall_s": round(row.wall_s, 3), "message": json.loads(row.body)}).encode() + b"\n")
    return len(rows)


def rows_of(name: str) -> Iterator[tuple[float, Any]]:
    """(wall time, message) of a packed recording."""
    with gzip.open(FOLDER / f"{name}.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            message = decode_up(json.dumps(row["message"]).encode())
            if message is not None:
                yield row["wall_s"], message


class RecordedRun:
    """A `Source`: the run as its screen saw it when rank 0 had finished `until_step`; None: at its end."""

    connection = "live"
    can_control = True

    def __init__(self, name: str, until_step: int | None = None) -> None:
        self.state = RunState()
        self.sent: list[Command] = []
        self.wall_s = 0.0
        self._changed = True
        for wall_s, message in rows_of(name):
            self.state.apply(message)
            self.wall_s = wall_s
            if isinstance(message, Heartbeat):
                self.state.hub_now_ns = max(self.state.hub_now_ns, message.now_ns)
            done = isinstance(message, StepResult) and message.rank == 0 and message.step
            if until_step is not None and done and done >= until_step:
                break
        if until_step is None:
            self.connection, self.can_control = "ended", False

    def start(self) -> None:
        self._changed = True

    def poll(self) -> bool:
        changed, self._changed = self._changed, False
        return changed

    def wait(self, timeout_s: float) -> None:
        """Nothing will come."""

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def age_s(self) -> float | None:
        return 0.1

    def close(self) -> None:
        """Nothing is open."""


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])), "messages")
