"""The size limit of a recording: at the limit, the oldest rows that a screen needs least are deleted first."""

from __future__ import annotations

import sqlite3

LIMIT_BYTES = 256 * 2**20
ROOM = 0.75
"""Thinning brings the recording down to this share of its limit."""
ROUNDS = 8

_SAMPLED = ("step", "memory", "heartbeat", "node", "collectives", "phases", "status")
_RARE = ("event", "checkpoint_saved", "command_record", "evaluation", "goodbye")
_OLDER_HALF = """
id <= (SELECT id FROM messages WHERE kind IN ({kinds}) ORDER BY id
       LIMIT 1 OFFSET (SELECT count(*) / 2 FROM messages WHERE kind IN ({kinds})))
"""
# Of every source and kind the newest stays, and from there backwards every second one.
_HALVE = """
DELETE FROM messages WHERE id IN (
    SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY attempt, source, kind ORDER BY id DESC) AS number
                    FROM messages WHERE kind IN ({kinds}) AND {older}) WHERE number % 2 = 0)
"""
_DELETE = "DELETE FROM messages WHERE kind IN ({kinds}) AND {older}"


def used_bytes(database: sqlite3.Connection) -> int:
    """The part of the file that holds rows; the rest is reused before the file grows."""
    (page,) = database.execute("PRAGMA page_size").fetchone()
    (count,) = database.execute("PRAGMA page_count").fetchone()
    (free,) = database.execute("PRAGMA freelist_count").fetchone()
    return int(page * (count - free))


def thin(database: sqlite3.Connection, limit_bytes: int) -> None:
    """Bring the recording down to ROOM of its limit. First the older half of the log records goes (the log files
    have them), then every second sample of the older half, and only if that is not enough the older half of events,
    command records and evaluations. The hellos and the data reports stay."""
    wanted = ROOM * limit_bytes
    for _ in range(ROUNDS):
        for statement, kinds in ((_DELETE, ("log",)), (_HALVE, _SAMPLED)):
            _run(database, statement, kinds)
            if used_bytes(database) <= wanted:
                return
    while used_bytes(database) > wanted and _run(database, _DELETE, (*_RARE, *_SAMPLED, "log")):
        pass


def _run(database: sqlite3.Connection, statement: str, kinds: tuple[str, ...]) -> int:
    """Returns how many rows were deleted."""
    names = ", ".join(f"'{kind}'" for kind in kinds)
    with database:
        return database.execute(statement.format(kinds=names, older=_OLDER_HALF.format(kinds=names))).rowcount
