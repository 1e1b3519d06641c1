"""The size limit of a recording: at the limit, the oldest rows that a screen needs least are deleted first."""

from __future__ import annotations

import sqlite3
import time

from zerotop.hub import blocks

LIMIT_BYTES = 192 * 2**20
STEPS_KEPT = 20_000
"""Steps of rank 0: with more, every second one of the older half goes, so that a run's whole curve stays."""
ROOM = 0.75
"""Thinning brings the recording down to this share of its limit."""
ROUNDS = 8

_SAMPLED = ("step", "memory", "heartbeat", "node", "collectives", "phases", "status")
_RARE = ("event", "checkpoint_saved", "command_record", "evaluation", "goodbye")
_OLDER_HALF = """
id <= (SELECT id FROM messages WHERE kind IN ({kinds}) ORDER BY id
       LIMIT 1 OFFSET (SELECT count(*) / 2 FROM messages WHERE kind IN ({kinds})))
"""
# Of every source and kind the newest stays, from there backwards every second one, and the first.
_HALVE = """
DELETE FROM messages WHERE id IN (
    SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY attempt, source, kind ORDER BY id DESC) AS number,
                           min(id) OVER (PARTITION BY attempt, source, kind) AS first
                    FROM messages WHERE kind IN ({kinds}) AND {older}) WHERE number % 2 = 0 AND id <> first)
"""
_OLDEST_BLOCKS = """
DELETE FROM blocks WHERE first_row <= (
    SELECT first_row FROM blocks ORDER BY first_row LIMIT 1 OFFSET (SELECT count(*) / 4 FROM blocks))
"""
_DELETE = "DELETE FROM messages WHERE kind IN ({kinds}) AND {older}"


def used_bytes(database: sqlite3.Connection) -> int:
    """The part of the file that holds rows; the rest is reused before the file grows."""
    (page,) = database.execute("PRAGMA page_size").fetchone()
    (count,) = database.execute("PRAGMA page_count").fetchone()
    (free,) = database.execute("PRAGMA freelist_count").fetchone()
    return int(page * (count - free))


def thin_steps(database: sqlite3.Connection, most: int = STEPS_KEPT) -> None:
    """Halve the older half of rank 0's steps if there are too many."""
    count = "SELECT count(*) FROM messages WHERE kind = 'step' AND source = 'rank/0'"
    (steps,) = database.execute(count).fetchone()
    if steps > most:
        _run(database, _HALVE, ("step",))


def thin(database: sqlite3.Connection, limit_bytes: int) -> None:
    """Bring the recording down to ROOM of its limit. First the older half of the log records goes (the log files
    have them); then blocks are thinned before their time, oldest first, and every second sample of the older half; and
    only if that is not enough the oldest blocks, and the older half of events, command records and evaluations. The
    hellos and the data reports stay."""
    wanted = ROOM * limit_bytes
    blocks.create(database)
    _run(database, _DELETE, ("log",))
    while used_bytes(database) > wanted:
        with database:
            if not blocks.thin_older(database, time.time(), early=True):
                break
    for _ in range(ROUNDS):
        for statement, kinds in ((_DELETE, ("log",)), (_HALVE, _SAMPLED)):
            _run(database, statement, kinds)
            if used_bytes(database) <= wanted:
                return
    while used_bytes(database) > wanted and _drop_oldest_blocks(database):
        pass
    while used_bytes(database) > wanted and _run(database, _DELETE, (*_RARE, *_SAMPLED, "log")):
        pass


def _drop_oldest_blocks(database: sqlite3.Connection) -> int:
    with database:
        return database.execute(_OLDEST_BLOCKS).rowcount


def _run(database: sqlite3.Connection, statement: str, kinds: tuple[str, ...]) -> int:
    """Returns how many rows were deleted."""
    names = ", ".join(f"'{kind}'" for kind in kinds)
    with database:
        return database.execute(statement.format(kinds=names, older=_OLDER_HALF.format(kinds=names))).rowcount
