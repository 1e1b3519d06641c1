"""What happened when: the moments that a replay can jump to."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import NamedTuple

from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.messages import CheckpointSaved, CommandRecord, Event, Goodbye, LogRecord, RunStatus
from zerotop.hub import timeline
from zerotop.state.events import record_severity, record_text

_QUERY = (
    "SELECT id, attempt, wall_s, body FROM messages "
    "WHERE kind IN ('event', 'checkpoint_saved', 'command_record', 'goodbye', 'status') ORDER BY id"
)
_WARNINGS = (
    "SELECT id, attempt, wall_s, body FROM messages WHERE kind = 'log' AND (instr(body, ?) OR instr(body, ?) OR "
    "instr(body, ?)) ORDER BY id"
)
_LEVELS = (b'"level":"warning"', b'"level":"error"', b'"level":"critical"')
MOST = 20_000
"""Marks kept; of more, the newest."""


class Mark(NamedTuple):
    """Something that happened. severity: info, warning or error."""

    wall_s: float
    what: str
    severity: str
    text: str


def read_marks(run: Path) -> list[Mark]:
    """Events, warnings, checkpoints, answered commands, ends of ranks and changes of the run's state, oldest first."""
    database = timeline.open_recording(run)
    try:
        rows = sorted([*database.execute(_QUERY), *database.execute(_WARNINGS, _LEVELS)])
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return []  # the recorder has only just made the file
    finally:
        database.close()
    kept: list[Mark] = []
    state = ""
    for _, attempt, wall_s, body in rows:
        mark = _mark(attempt, wall_s, body)
        if mark is None or (mark.what == "state" and mark.text == state):
            continue
        state = mark.text if mark.what == "state" else state
        kept.append(mark)
    return kept[-MOST:]


def _mark(attempt: int, wall_s: float, body: bytes) -> Mark | None:
    try:
        message = decode_up(body)
    except ProtocolError:
        return None
    match message:
        case Event() | LogRecord() | CheckpointSaved():
            severity = record_severity(message).replace("critical", "error").replace("debug", "info")
            what = (
                message.what
                if isinstance(message, Event)
                else "checkpoint"
                if isinstance(message, CheckpointSaved)
                else "log"
            )
            return Mark(wall_s, what, severity, record_text(message))
        case CommandRecord(command=command, ack=ack) if ack.state != "accepted":
            at = f" at step {ack.step}" if ack.step is not None else ""
            why = f": {ack.reason}" if ack.reason else ""
            severity = "warning" if ack.state == "rejected" else "info"
            return Mark(wall_s, "command", severity, f"{command.name} {ack.state}{at}{why}")
        case Goodbye(outcome="failed"):
            return Mark(wall_s, "exit", "error", f"rank {message.rank} failed at step {message.step}")
        case RunStatus():
            severity = "error" if message.state in ("failed", "aborted") else "info"
            again = f", attempt {attempt}" if attempt > 1 else ""
            return Mark(wall_s, "state", severity, f"{message.state}{again}")
    return None
