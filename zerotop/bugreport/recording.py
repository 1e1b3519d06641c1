"""The recording of a run for the report: a copy of its newest rows without secrets and without training data."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zerotop.bugreport.redact import Redactor

ROWS_BYTES = 16 * 2**20
"""Bytes of messages that are copied, the newest ones."""
EVENTS_KEPT = 2000
_SCHEMA = (
    "CREATE TABLE messages(id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, wall_s REAL NOT NULL, "
    "source TEXT NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL)"
)
_FIGURES = frozenset({"phases", "collectives", "heartbeat", "memory", "step"})
"""Kinds that hold figures and fixed words only."""
_LISTED = frozenset({"event", "log", "checkpoint_saved", "goodbye"})


@dataclass
class CopiedRecording:
    """What was copied. `events` and `commands` are the messages that people read, oldest first."""

    rows: int = 0
    left_out: int = 0
    samples: int = 0
    """Samples of training data and generated texts that were taken out."""
    events: list[dict[str, Any]] = field(default_factory=list)
    commands: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""


def copy_recording(source: Path, target: Path, redactor: Redactor) -> CopiedRecording:
    """Copy RUN/recording.sqlite to `target`, which does not exist. Works while the run records. A damaged file is
    copied as far as it can be read, and `problem` says so."""
    copied = CopiedRecording()
    if not source.exists():
        copied.problem = "there is no recording"
        return copied
    address = str(source).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    with closing(sqlite3.connect(target)) as out:
        out.execute(_SCHEMA)
        try:
            with closing(sqlite3.connect(f"file:{address}?mode=ro", uri=True, timeout=5)) as database:
                _copy(database, out, redactor, copied)
        except sqlite3.Error as error:
            copied.problem = f"the recording can't be read further: {error}"
        out.commit()
    copied.events, copied.commands = copied.events[::-1][-EVENTS_KEPT:], copied.commands[::-1]
    return copied


def _copy(database: sqlite3.Connection, out: sqlite3.Connection, redactor: Redactor, copied: CopiedRecording) -> None:
    left = ROWS_BYTES
    commands: set[str] = set()
    for number, attempt, wall_s, source, kind, body in database.execute(
        "SELECT id, attempt, wall_s, source, kind, body FROM messages ORDER BY id DESC"
    ):
        size = len(body)
        if size > left:
            (copied.left_out,) = database.execute("SELECT count(*) FROM messages WHERE id <= ?", (number,)).fetchone()
            return
        left -= size
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
        if kind in _FIGURES:
            written = redactor.text(text)
        else:
            message = _readable(text, kind, redactor, copied)
            written = json.dumps(message, separators=(",", ":"), ensure_ascii=False)
            if isinstance(message, dict) and kind in _LISTED and len(copied.events) < EVENTS_KEPT:
                copied.events.append({"attempt": attempt, **message})
            if isinstance(message, dict) and kind == "command_record":
                identity = str((message.get("command") or {}).get("id"))
                if identity not in commands:  # the newest state of each
                    commands.add(identity)
                    copied.commands.append(message)
        row = (number, attempt, wall_s, redactor.text(source), kind, written.encode())
        out.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)", row)
        copied.rows += 1


def _readable(text: str, kind: str, redactor: Redactor, copied: CopiedRecording) -> Any:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return redactor.text(text)
    if kind == "data_report" and isinstance(message, dict):
        copied.samples += len(message.get("examples") or [])
        message["examples"] = []
    if kind == "evaluation" and isinstance(message, dict):
        copied.samples += len(message.get("generations") or [])
        message["generations"] = []
    return redactor.json(message)
