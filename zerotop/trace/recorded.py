"""Reads the timeline of a run from its recording: phases and collectives of each rank.

Of the last minutes everything is there (zerotop/hub/timeline.py); of earlier times one packet a second.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runtime.wire.base import Message
from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.messages import CheckpointSaved, CommandRecord, Event, Hello
from zerotop.hub.blocks import packed_rows
from zerotop.hub.timeline import extent, open_recording, read_rows

_SAMPLES = (
    "SELECT attempt, body FROM messages WHERE source = ? AND kind IN ('phases', 'collectives') "
    "AND wall_s >= ? AND wall_s < ? ORDER BY id"
)
_MARKS = ("event", "checkpoint_saved", "command_record")


class Phase(NamedTuple):
    """A phase interval; times on the rank's CLOCK_MONOTONIC."""

    attempt: int
    name: str
    step: int
    micro_step: int
    start_ns: int
    end_ns: int


class Collective(NamedTuple):
    """A finished collective; times on the rank's CLOCK_MONOTONIC."""

    attempt: int
    step: int
    group: str
    seq: int
    op: str
    nbytes: int
    issue_ns: int
    end_ns: int
    duration_us: int
    wait_us: int


@dataclass(frozen=True)
class Window:
    """What to read: messages that the hub received since a wall time, and of these the steps from `first` to `last`
    (None: all)."""

    since_wall_s: float = 0.0
    first: int | None = None
    last: int | None = None

    def has(self, step: int) -> bool:
        """Whether the step is wanted."""
        return (self.first is None or step >= self.first) and (self.last is None or step <= self.last)


class RecordedTimeline:
    """The recording of one run. Use it as a context. Raises FileNotFoundError or sqlite3.Error."""

    def __init__(self, run: Path) -> None:
        self._database = open_recording(run)
        self.sampled = False
        """Whether something that was read is of a time of which the recording has samples only."""
        try:
            self.hellos: list[Hello] = [one for one in self._messages("hello") if isinstance(one, Hello)]
            self._extent = extent(self._database)
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):  # the recorder has only just made the file
                raise
            self.hellos, self._extent = [], None

    def __enter__(self) -> RecordedTimeline:
        return self

    def __exit__(self, *problem: object) -> None:
        self._database.close()

    @property
    def ranks(self) -> list[int]:
        """The ranks that have reported."""
        return sorted({hello.rank for hello in self.hellos})

    @property
    def complete_since_wall_s(self) -> float | None:
        """The wall time from which on the recording has every phase and collective; None: it has samples only."""
        return self._extent[0] if self._extent else None

    @property
    def end_wall_s(self) -> float | None:
        """The wall time of the newest phase or collective; None if there is none."""
        if self._extent:
            return self._extent[1]
        query = "SELECT max(wall_s) FROM messages WHERE kind IN ('phases', 'collectives')"
        (newest,) = self._database.execute(query).fetchone()
        return None if newest is None else float(newest)

    def read(self, rank: int, window: Window) -> tuple[list[Phase], list[Collective]]:
        """The phases and collectives of a rank, each in the order of attempts and starts, without repetitions."""
        phases: set[Phase] = set()
        collectives: set[Collective] = set()
        for attempt, body, sampled in self._bodies(f"rank/{rank}", window.since_wall_s):
            before = len(phases) + len(collectives)
            try:
                _take(attempt, body, window, phases, collectives)
            except (KeyError, TypeError, ValueError):
                continue  # a message of another version
            self.sampled |= sampled and len(phases) + len(collectives) > before
        return (
            sorted(phases, key=lambda one: (one.attempt, one.start_ns)),
            sorted(collectives, key=lambda one: (one.attempt, one.group, one.seq)),
        )

    def _bodies(self, source: str, since_wall_s: float) -> Iterator[tuple[int, dict[str, Any], bool]]:
        """(attempt, message, whether it is a sample)."""
        dense = self._extent[0] if self._extent else float("inf")
        packed = packed_rows(self._database, ("phases", "collectives"), since_wall_s)
        samples = [(row.attempt, row.body) for row in packed if row.source == source and row.wall_s < dense]
        samples += self._database.execute(_SAMPLES, (source, since_wall_s, dense))
        for attempt, body in samples:
            try:
                found = json.loads(body)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield attempt, found, True
        for row in read_rows(self._database, source, since_wall_s):
            for message in row.messages:
                yield row.attempt, message, False

    def marks(self, since_wall_s: float) -> Iterator[Event | CheckpointSaved | CommandRecord]:
        """Events, checkpoints and commands since then."""
        for kind in _MARKS:
            for message in self._messages(kind, since_wall_s):
                if isinstance(message, Event | CheckpointSaved | CommandRecord):
                    yield message

    def _messages(self, kind: str, since_wall_s: float = 0.0) -> Iterator[Message]:
        query = "SELECT body FROM messages WHERE kind = ? AND wall_s >= ? ORDER BY id"
        for (body,) in self._database.execute(query, (kind, since_wall_s)):
            try:
                message = decode_up(body)
            except ProtocolError:
                continue
            if message is not None:
                yield message


def _take(
    attempt: int, message: dict[str, Any], window: Window, phases: set[Phase], collectives: set[Collective]
) -> None:
    if message["kind"] == "phases":
        for name, step, micro_step, start_ns, end_ns in message["spans"]:
            if window.has(step):
                phases.add(Phase(attempt, str(name), int(step), int(micro_step), int(start_ns), int(end_ns)))
    elif message["kind"] == "collectives" and window.has(message["step"]):
        step, group = int(message["step"]), str(message.get("group", "world"))
        for seq, op, nbytes, issue_ns, end_ns, duration_us, wait_us in message["records"]:
            figures = (int(nbytes), int(issue_ns), int(end_ns), int(duration_us), int(wait_us))
            collectives.add(Collective(attempt, step, group, int(seq), str(op), *figures))
