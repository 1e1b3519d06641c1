"""Exports the recorded timeline of a run as a trace."""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.wire.rundir import RunFile
from zerotop.trace.recorded import RecordedTimeline, Window
from zerotop.trace.timeline import TimelineTracks, clocks_of
from zerotop.trace.writer import Stream, TraceWriter

FORMAT = 1
"""Version of the metadata."""


class Exported(NamedTuple):
    """What was written."""

    ranks: int
    slices: int
    first_step: int | None
    last_step: int | None
    complete: bool
    """Whether it has every phase and collective of its time; otherwise some are one packet a second."""


def export_timeline(run: RunFile, timeline: RecordedTimeline, window: Window, stream: Stream) -> Exported:
    """Write the phases and collectives of the window to `stream`."""
    writer = TraceWriter(stream)
    clocks = clocks_of(timeline, window)
    origin_ns = round(run.created_wall_s * 1e9)
    tracks = TimelineTracks(writer, clocks, origin_ns)
    for rank in timeline.ranks:
        hello = [one for one in timeline.hellos if one.rank == rank][-1]
        tracks.rank(rank, hello, *timeline.read(rank, window))
    slices = writer.slices
    tracks.marks(timeline.marks(window.since_wall_s))
    metadata: dict[str, Any] = {
        "zerotop_trace": FORMAT,
        "run": run.name,
        "origin_wall_s": run.created_wall_s,
        "clocks": clocks.document(),
        "complete": not timeline.sampled,
        "steps": [tracks.first_step, tracks.last_step],
    }
    writer.finish(metadata)
    return Exported(len(timeline.ranks), slices, tracks.first_step, tracks.last_step, not timeline.sampled)
