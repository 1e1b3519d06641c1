"""The always-on timeline: every phase and collective of the last minutes, in a table of the recording.

The recording keeps phases and collectives once a second, which is enough for a replay but has gaps. This table has all
of them, for `zerotop trace`: one compressed row per rank and second, the oldest deleted.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime.wire.base import Message
from runtime.wire.codec import encode
from runtime.wire.messages import Collectives, Phases

KEPT_S = 600.0
KEPT_BYTES = 64 * 2**20
"""Compressed; a quarter of a recording's limit."""
QUEUED = 20_000
"""Messages kept in memory while nothing can be written; beyond that the oldest are dropped."""
PRUNE_EVERY = 10
"""Writes between two looks at what is too old."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS timeline(
    id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, source TEXT NOT NULL, first_wall_s REAL NOT NULL,
    last_wall_s REAL NOT NULL, body BLOB NOT NULL)
"""
_INSERT = "INSERT INTO timeline(attempt, source, first_wall_s, last_wall_s, body) VALUES (?, ?, ?, ?, ?)"
_OLDEST_QUARTER = """
DELETE FROM timeline WHERE id <= (
    SELECT id FROM timeline ORDER BY id LIMIT 1 OFFSET (SELECT count(*) / 4 FROM timeline))
"""
_TABLE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'timeline'"


class _Queued(NamedTuple):
    attempt: int
    wall_s: float
    source: str
    message: Message


class TimelineTable:
    """The writing side. `add` belongs to the hub's thread, the rest to the thread that writes the recording."""

    def __init__(self) -> None:
        self._queue: deque[_Queued] = deque(maxlen=QUEUED)
        self._writes = 0

    def add(self, attempt: int, wall_s: float, source: str, message: Message) -> None:
        """Take a message of a rank; others than Phases and Collectives are ignored."""
        if isinstance(message, Phases | Collectives):
            self._queue.append(_Queued(attempt, wall_s, source, message))

    def write(self, database: sqlite3.Connection) -> None:
        """Write what is queued, one row per rank, and delete what is too old. Call it inside a transaction; if that
        fails, what was queued is lost."""
        groups: dict[tuple[int, str], list[_Queued]] = {}
        for _ in range(len(self._queue)):
            one = self._queue.popleft()
            groups.setdefault((one.attempt, one.source), []).append(one)
        if not groups:
            return
        rows = [
            (attempt, source, queued[0].wall_s, queued[-1].wall_s, _packed(queued))
            for (attempt, source), queued in groups.items()
        ]
        database.executemany(_INSERT, rows)
        self._writes += 1
        if self._writes % PRUNE_EVERY == 1:
            prune(database, max(row[3] for row in rows))


def create(database: sqlite3.Connection) -> None:
    """Create the table unless it is there."""
    database.execute(_SCHEMA)


def prune(database: sqlite3.Connection, now_wall_s: float, kept_bytes: int = KEPT_BYTES) -> None:
    """Delete what is older than KEPT_S, and the oldest quarter of what takes more than kept_bytes."""
    database.execute("DELETE FROM timeline WHERE last_wall_s < ?", (now_wall_s - KEPT_S,))
    while _bytes(database) > kept_bytes and database.execute(_OLDEST_QUARTER).rowcount > 0:
        pass


def _bytes(database: sqlite3.Connection) -> int:
    (size,) = database.execute("SELECT coalesce(sum(length(body)), 0) FROM timeline").fetchone()
    return int(size)


def _packed(queued: list[_Queued]) -> bytes:
    return zlib.compress(b"\n".join(encode(one.message) for one in queued), 1)


def unpacked(body: bytes) -> list[bytes]:
    """The JSON of the messages in a row; none if it cannot be read."""
    try:
        return zlib.decompress(body).split(b"\n")
    except zlib.error:
        return []


class TimelineRow(NamedTuple):
    """What the hub received from one rank within about a second: the bodies of its messages."""

    attempt: int
    source: str
    first_wall_s: float
    last_wall_s: float
    messages: list[dict[str, Any]]


def extent(database: sqlite3.Connection) -> tuple[float, float] | None:
    """The hub's wall time at the first and at the last message of the table; None if there is none."""
    if not database.execute(_TABLE).fetchone():
        return None
    first, last = database.execute("SELECT min(first_wall_s), max(last_wall_s) FROM timeline").fetchone()
    return None if first is None else (first, last)


def read_rows(database: sqlite3.Connection, source: str, since_wall_s: float = 0.0) -> Iterator[TimelineRow]:
    """The rows of a rank with messages since then, oldest first. Rows that cannot be read are skipped."""
    if not database.execute(_TABLE).fetchone():
        return
    query = (
        "SELECT attempt, source, first_wall_s, last_wall_s, body FROM timeline "
        "WHERE source = ? AND last_wall_s >= ? ORDER BY id"
    )
    for attempt, name, first, last, body in database.execute(query, (source, since_wall_s)):
        try:
            messages = [json.loads(line) for line in unpacked(body)]
        except ValueError:
            continue
        if not messages:
            continue
        yield TimelineRow(attempt, name, first, last, [one for one in messages if isinstance(one, dict)])


def open_recording(run: Path) -> sqlite3.Connection:
    """RUN/recording.sqlite, for reading only. Raises FileNotFoundError or sqlite3.Error."""
    path = run / "recording.sqlite"
    if not path.exists():
        raise FileNotFoundError(path)
    quoted = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{quoted}?mode=ro", uri=True, timeout=5)
