"""Sends Python's log records to the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from runtime.wire.startnote import tell_start

LevelName = Literal["debug", "info", "warning", "error", "critical"]
TEXT_KEPT = 8000
"""Most characters of one record; the rank's log file has the rest."""


def level_name(number: int) -> LevelName:
    """The name of a numeric level of Python's logging."""
    if number >= logging.CRITICAL:
        return "critical"
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


class StartHandler(logging.Handler):
    """Tells the lines that are logged before the rank has introduced itself, such as how far a download is."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            tell_start(record.getMessage())
        except Exception:
            self.handleError(record)


class TelemetryHandler(logging.Handler):
    """Passes every record, with its traceback, to `send(level, text, logger, wall_s)`. setLevel works at any time."""

    def __init__(self, send: Callable[[LevelName, str, str, float], None], level: int = logging.INFO) -> None:
        super().__init__(level)
        self._send = send
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            text = self.format(record)
            if len(text) > TEXT_KEPT:
                text = f"{text[:TEXT_KEPT]}... ({len(text) - TEXT_KEPT} more characters)"
            self._send(level_name(record.levelno), text, record.name, record.created)
        except Exception:
            self.handleError(record)  # for example a wrong format string in a script's log call
