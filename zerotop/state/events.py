"""The records of the event pane, in the words and severities that the screen and the command line share."""

from __future__ import annotations

from runtime.wire.messages import CheckpointSaved, Event, LogRecord
from zerotop.format import ms_text

Record = Event | LogRecord | CheckpointSaved


TRAINER_LOGGER = "runtime.train"
"""Writes a line of figures every few steps, which the header and the plots have, too."""


def is_progress(record: Record) -> bool:
    """Whether it is such a line."""
    if not isinstance(record, LogRecord) or record.logger != TRAINER_LOGGER:
        return False
    return record.level == "info" and record.text.startswith("step ")


def record_text(record: Record) -> str:
    """What a record says, without who says it and when."""
    if isinstance(record, CheckpointSaved):
        took, waited = ms_text(1000 * record.seconds), ms_text(record.blocked_ms)
        return f"checkpoint at step {record.step} saved in {took} (training waited {waited})"
    return record.text


def record_severity(record: Record) -> str:
    """info, warning or error; of a log record also debug and critical."""
    if isinstance(record, CheckpointSaved):
        return "info"
    return record.severity if isinstance(record, Event) else record.level
