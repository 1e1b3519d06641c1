"""What people have noted about a run: RUN/notes.jsonl, a line for each note."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

from zerotop.rundir.paths import RunError, error_text

NAME = "notes.jsonl"
LONGEST = 2000
"""Characters of a note."""


class Note(NamedTuple):
    """A note, and when and by whom it was made."""

    wall_s: float
    who: str
    text: str


def add_note(run: Path, text: str, who: str) -> Note:
    """Append a note. Raises RunError if it is empty, too long, or cannot be written."""
    text = " ".join(text.split())
    if not text:
        raise RunError("the note is empty: expected some words")
    if len(text) > LONGEST:
        raise RunError(f"the note has {len(text):,} characters: expected at most {LONGEST:,}")
    note = Note(time.time(), who, text)
    line = json.dumps(note._asdict(), ensure_ascii=False) + "\n"
    try:
        descriptor = os.open(run / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(line)  # one write: two notes at once do not mix
    except OSError as error:
        raise RunError(f"can't write the note: {error_text(error)}") from None
    return note


def read_notes(run: Path) -> list[Note]:
    """The notes of a run, oldest first, without lines that cannot be read."""
    try:
        lines = (run / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    notes = []
    for line in lines:
        try:
            found = json.loads(line)
            notes.append(Note(float(found["wall_s"]), str(found["who"]), str(found["text"])))
        except (ValueError, KeyError, TypeError):
            continue
    return notes
