"""A few figures of a run for a list of runs, without folding its recording."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.messages import Memory, StepResult
from zerotop.hub import timeline

POINTS = 48
_STEPS = "FROM messages WHERE kind = 'step' AND source = 'rank/0'"
_SOURCE = re.compile(r"rank/\d+")


@dataclass(frozen=True)
class Glance:
    """losses: of at most POINTS steps over the whole run; memory_bytes: of the rank that uses most, on its device, else
    of its process; None where nothing is recorded."""

    losses: tuple[float, ...] = ()
    loss: float | None = None
    step: int | None = None
    memory_bytes: int | None = None


def glance(run: Path) -> Glance:
    """The figures of a run directory; an empty glance of a run without a readable recording."""
    try:
        with closing(timeline.open_recording(run)) as database:
            return _read(database)
    except (FileNotFoundError, sqlite3.Error):
        return Glance()


def _read(database: sqlite3.Connection) -> Glance:
    numbers = [number for (number,) in database.execute(f"SELECT id {_STEPS} ORDER BY id")]
    stride = max(1, -(-len(numbers) // POINTS))
    chosen = numbers[::-1][::stride][::-1]
    marks = ",".join("?" * len(chosen))
    bodies = database.execute(f"SELECT body FROM messages WHERE id IN ({marks}) ORDER BY id", chosen)
    steps = [one for (body,) in bodies if isinstance(one := _decoded(body), StepResult)]
    known = [one.loss for one in steps if one.loss is not None]
    used: dict[str, int] = {}
    newest = "SELECT source, body FROM messages WHERE kind = 'memory' ORDER BY id DESC LIMIT 256"
    for source, body in database.execute(newest):
        if source not in used and _SOURCE.fullmatch(source):
            memory = _decoded(body)
            if isinstance(memory, Memory):
                used[source] = memory.device_used_bytes or memory.allocated_bytes or memory.rss_bytes
    return Glance(
        losses=tuple(known),
        loss=steps[-1].loss if steps else None,
        step=steps[-1].step if steps else None,
        memory_bytes=max(used.values(), default=None),
    )


def _decoded(body: bytes) -> object:
    try:
        return decode_up(body)
    except ProtocolError:
        return None
