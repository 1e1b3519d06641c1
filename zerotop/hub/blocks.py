"""Samples that have grown old, packed into compressed blocks, which thin out with age.

A recording keeps what happens once (hellos, events, commands, checkpoints, evaluations, the steps of rank 0, changes of
the status and of the verdict) as rows of the table `messages`. Samples (heartbeats, memory, nodes, phases, collectives,
the steps of the other ranks) move from there into blocks:

level  age          one sample of each source and kind in   a block spans
0      10 minutes   1 s, as it was recorded                 1 minute
1      1 hour       10 s                                    10 minutes
2      1 day        1 minute                                1 hour

So every block holds about sixty moments, and any moment of a week is one decompression away.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PACK_AFTER_S = 600.0
"""Younger samples stay rows, which reports and traces read first."""
SPACING_S = (1, 10, 60)
"""Seconds between two samples, by level."""
SPAN_S = (60, 600, 3600)
"""Seconds that a block spans, by level."""
KEPT_S = (3600.0, 86_400.0)
"""Age at which a block leaves its level; the last level is kept."""
ROWS_AT_ONCE = 20_000
"""Most rows of one block; a minute of more ranks becomes several."""
PACKED = frozenset({"heartbeat", "memory", "node", "collectives", "phases", "step", "time_report", "status", "verdict"})
_LEVEL = 6
_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks(
    id INTEGER PRIMARY KEY, level INTEGER NOT NULL, first_wall_s REAL NOT NULL, last_wall_s REAL NOT NULL,
    first_row INTEGER NOT NULL, last_row INTEGER NOT NULL, body BLOB NOT NULL)
"""
_INSERT = "INSERT INTO blocks(level, first_wall_s, last_wall_s, first_row, last_row, body) VALUES (?, ?, ?, ?, ?, ?)"
_WAITING = "SELECT id, attempt, wall_s, source, kind, body FROM messages WHERE id > ? ORDER BY id LIMIT ?"


class Row(NamedTuple):
    """A recorded message that is not decoded yet. `number`: its place in the recording; body: its JSON."""

    number: int
    attempt: int
    wall_s: float
    source: str
    kind: str
    body: bytes


class BlockInfo(NamedTuple):
    """A block without its content."""

    number: int
    level: int
    first_wall_s: float
    last_wall_s: float


def create(database: sqlite3.Connection) -> None:
    """Create the table unless it is there."""
    database.execute(_SCHEMA)


class Packer:
    """Packs and thins one recording, a block at a time. Belongs to the thread that writes the recording."""

    def __init__(self) -> None:
        self._packed_to: int | None = None
        self._before: dict[tuple[str, str], bytes] = {}
        """(source, kind) -> what the newest status and verdict said, without the figures that always change."""

    def work(self, database: sqlite3.Connection, now_wall_s: float) -> bool:
        """Pack one block of rows, or thin one group of blocks; False if nothing is old enough. A transaction of its
        own."""
        try:
            with database:
                return self._pack(database, now_wall_s) or thin_older(database, now_wall_s)
        except BaseException:
            self._packed_to = None  # rolled back: the table says how far it went
            raise

    def _pack(self, database: sqlite3.Connection, now_wall_s: float) -> bool:
        if self._packed_to is None:
            (self._packed_to,) = database.execute("SELECT coalesce(max(last_row), 0) FROM blocks").fetchone()
        rows = []
        end_s: float | None = None
        for values in database.execute(_WAITING, (self._packed_to, ROWS_AT_ONCE)):
            row = Row(*values)
            if end_s is None:
                end_s = (row.wall_s // SPAN_S[0] + 1) * SPAN_S[0]
                if end_s > now_wall_s - PACK_AFTER_S:
                    return False
            if not end_s - SPAN_S[0] <= row.wall_s < end_s:  # the next minute, or the clock was set back
                break
            rows.append(row)
        if not rows:
            return False
        last = rows[-1].number
        samples = [row for row in rows if self._is_sample(row)]
        if samples:
            write_block(database, 0, samples, last)
            database.executemany("DELETE FROM messages WHERE id = ?", [(row.number,) for row in samples])
        self._packed_to = last
        return True

    def _is_sample(self, row: Row) -> bool:
        """Whether a row moves into a block. Changes of status and verdict stay rows: without them the state at a later
        moment could not be told."""
        if row.kind not in PACKED or (row.kind == "step" and row.source == "rank/0"):
            return False
        if row.kind in ("status", "verdict"):
            essence = _essence(row)
            if self._before.get((row.source, row.kind)) != essence:
                self._before[row.source, row.kind] = essence
                return False
        return True


def _essence(row: Row) -> bytes:
    try:
        fields = json.loads(row.body)
    except ValueError:
        return row.body
    kept = ("what", "ranks", "severity") if row.kind == "verdict" else tuple(set(fields) - {"step"})
    return json.dumps({name: fields.get(name) for name in kept}, sort_keys=True).encode() + b"%d" % row.attempt


def thin_older(database: sqlite3.Connection, now_wall_s: float, *, early: bool = False) -> bool:
    """Turn the oldest group of blocks that is due into one block of the next level; False if none is. `early`: the
    oldest group, whether it is due or not."""
    for level, kept_s in enumerate(KEPT_S):
        found = database.execute("SELECT min(first_wall_s) FROM blocks WHERE level = ?", (level,)).fetchone()
        if found[0] is None:
            continue
        span_s = SPAN_S[level + 1]
        begin_s = found[0] // span_s * span_s
        if early or begin_s + span_s <= now_wall_s - kept_s:
            _merge(database, level, begin_s, begin_s + span_s)
            return True
    return False


def _merge(database: sqlite3.Connection, level: int, begin_s: float, end_s: float) -> None:
    where = "level = ? AND first_wall_s >= ? AND first_wall_s < ?"
    chosen = (level, begin_s, end_s)
    kept: dict[tuple[int, int, str, str], Row] = {}
    last = 0
    for number, last_row in database.execute(f"SELECT id, last_row FROM blocks WHERE {where} ORDER BY id", chosen):
        last = max(last, last_row)
        for row in read_block(database, number):
            slot = int(row.wall_s // SPACING_S[level + 1])
            kept[slot, row.attempt, row.source, row.kind] = row  # the newest of its slot
    if kept:
        write_block(database, level + 1, sorted(kept.values()), last)
    database.execute(f"DELETE FROM blocks WHERE {where}", chosen)


def write_block(database: sqlite3.Connection, level: int, rows: list[Row], last_row: int) -> None:
    """Write rows, in their order, as one block; last_row: the newest row of the recording that has been looked at."""
    walls = [row.wall_s for row in rows]
    body = zlib.compress(b"\n".join(_line(row) for row in rows), _LEVEL)
    database.execute(_INSERT, (level, min(walls), max(walls), rows[0].number, last_row, body))


def _line(row: Row) -> bytes:
    head = f"{row.number} {row.attempt} {row.wall_s:.3f} {row.kind} {row.source}".replace("\n", " ").replace("\t", " ")
    return head.encode() + b"\t" + bytes(row.body)


def read_block(database: sqlite3.Connection, number: int) -> Iterator[Row]:
    """The rows of a block in their order; none of one that was thinned away meanwhile, or that is damaged."""
    found = database.execute("SELECT body FROM blocks WHERE id = ?", (number,)).fetchone()
    if found is None:
        return
    try:
        text = zlib.decompress(found[0])
    except zlib.error:
        return
    for line in text.split(b"\n"):
        head, _, body = line.partition(b"\t")
        place, attempt, wall_s, kind, source = head.decode().split(" ", 4)
        yield Row(int(place), int(attempt), float(wall_s), source, kind, body)


def list_blocks(database: sqlite3.Connection, since_wall_s: float = 0.0) -> list[BlockInfo]:
    """The blocks with rows since then, oldest first; none in a recording of an older version."""
    if not has_blocks(database):
        return []
    query = "SELECT id, level, first_wall_s, last_wall_s FROM blocks WHERE last_wall_s >= ? ORDER BY first_row"
    return [BlockInfo(*values) for values in database.execute(query, (since_wall_s,))]


def has_blocks(database: sqlite3.Connection) -> bool:
    """Whether the recording has the table."""
    found = database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'blocks'").fetchone()
    return found is not None


def packed_rows(database: sqlite3.Connection, kinds: Iterable[str] = PACKED, since_s: float = 0.0) -> Iterator[Row]:
    """The rows of these kinds in all blocks with rows since then, oldest first."""
    wanted = frozenset(kinds)
    for block in list_blocks(database, since_s):
        for row in read_block(database, block.number):
            if row.kind in wanted and row.wall_s >= since_s:
                yield row
