"""The right source for a run: live while it is live, afterwards its recording."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from runtime.wire.messages import RunStatus
from zerotop.rundir.directory import RunEntry, RunError, read_entry
from zerotop.source.base import Source, SourceError
from zerotop.source.live import LiveSource
from zerotop.source.recorded import RecordedSource


def open_source(entry: RunEntry) -> Source:
    """A started source. Raises SourceError for a live run on another host (the home is shared)."""
    source: Source
    if not entry.live:
        source = RecordedSource(entry.path, entry.status)
    elif entry.here:
        source = LiveSource(entry.sockets, entry.path, partial(_status_in_directory, entry.path, entry.name))
    else:
        raise SourceError(
            f"{entry.name} runs on {entry.run.host}, and its sockets are there: "
            f"zerotop attach {entry.run.host}:{entry.name}"
        )
    source.start()
    return source


def _status_in_directory(path: Path, name: str) -> RunStatus:
    try:
        return read_entry(path).status
    except RunError as error:
        return RunStatus(name=name, state="failed", reason=str(error))
