"""Merges what torch.profiler has recorded on several ranks, and the run's own timeline, into one trace."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.wire.messages import Hello
from runtime.wire.profile import CLOCK, profile_folder
from runtime.wire.rundir import RunFile, read_run
from zerotop.trace.clocks import Clocks
from zerotop.trace.export import FORMAT
from zerotop.trace.parts import PartClock, clock_of, events_of
from zerotop.trace.recorded import Collective, Phase, RecordedTimeline, Window
from zerotop.trace.timeline import TimelineTracks, clocks_of
from zerotop.trace.writer import TraceWriter, rank_pid, trace_file

FIRST_TID = 100
"""Of torch.profiler's tracks in a rank's process."""
RECORDED_WITHIN_S = 10.0
"""How long to wait for the recording to have the profiled steps; telemetry is sent and written once a second."""
_KEPT = frozenset("XBEbensftiIC")
_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation"})


def merge(run: Path, number: int, parts: Mapping[int, Path]) -> dict[str, Any]:
    """Write RUN/profiles/profile-NUMBER-steps-A-B.json.gz from the parts of the ranks, and delete these. Returns its
    path relative to `run`, bytes and steps. Raises OSError, or ValueError if no part can be read."""
    file = read_run(run)
    marks = {rank: clock_of(path) for rank, path in sorted(parts.items())}
    timeline = _Recorded(run, {rank: mark for rank, mark in marks.items() if mark is not None})
    first, last = timeline.steps()
    name = f"profile-{number}-steps-{first}-{last}.json.gz" if last else f"profile-{number}.json.gz"
    target = run / "profiles" / name
    with trace_file(target) as stream:
        writer = TraceWriter(stream)
        origin_ns = round(file.created_wall_s * 1e9)
        tracks = TimelineTracks(writer, timeline.clocks, origin_ns)
        damaged = []
        for rank, path in sorted(parts.items()):
            hello = timeline.hello(rank)
            tracks.rank(rank, hello, *timeline.around(rank))
            try:
                _write_part(writer, rank, path, timeline.shift_us(rank, path, origin_ns))
            except ValueError as error:
                damaged.append(f"rank {rank}: {error}")
        if len(damaged) == len(parts):
            raise ValueError("; ".join(damaged))
        writer.finish(_metadata(file, timeline, marks, damaged))
    os.chmod(target, 0o600)
    for path in parts.values():
        path.unlink()
    with contextlib.suppress(OSError):  # a rank's part that came too late is in it
        profile_folder(run, number).rmdir()
    return {"path": str(target.relative_to(run)), "bytes": target.stat().st_size, "steps": [first, last]}


def _metadata(
    file: RunFile, timeline: _Recorded, marks: Mapping[int, PartClock | None], damaged: list[str]
) -> dict[str, Any]:
    return {
        "zerotop_trace": FORMAT,
        "run": file.name,
        "origin_wall_s": file.created_wall_s,
        "clocks": timeline.clocks.document(),
        "profilers": [
            {
                "rank": rank,
                "clock": f"{mark.marks} marks of CLOCK_MONOTONIC" if mark else "none",
            }
            for rank, mark in marks.items()
        ],
        "damaged": damaged,
        "steps": list(timeline.steps()),
    }


def _write_part(writer: TraceWriter, rank: int, path: Path, shift_us: float) -> None:
    """Write the events of one part, moved by shift_us, with all of its processes as tracks of the rank's one."""
    pid = rank_pid(rank)
    tracks: dict[tuple[str, str], int] = {}
    names: dict[tuple[str, str], str] = {}
    on_gpu: set[tuple[str, str]] = set()
    try:
        for event in events_of(path):
            key = (str(event.get("pid", "")), str(event.get("tid", "")))
            kind = event.get("ph")
            if kind == "M":
                if event.get("name") == "thread_name":
                    names[key] = str(event.get("args", {}).get("name", ""))
                continue
            stamp = event.get("ts")
            if kind not in _KEPT or not isinstance(stamp, int | float) or not key[0].isdecimal():
                continue  # processes with names are the profiler's own
            if str(event.get("name", "")).startswith(CLOCK):
                continue
            if event.get("cat") in _GPU:
                on_gpu.add(key)
            moved = event | {"pid": pid, "tid": tracks.setdefault(key, FIRST_TID + len(tracks))}
            moved["ts"] = round(max(0.0, stamp + shift_us), 3)
            if "id" in event and kind != "X":
                moved["id"] = f"{rank}.{event['id']}"  # flows of one rank must not meet those of another
            writer.raw(moved)
            writer.slices += kind == "X"
    finally:  # also of a part that ends within an event
        for key, tid in tracks.items():
            name = names.get(key) or f"thread {key[1]}"
            writer.track(pid, tid, f"GPU {key[0]}: {name}" if key in on_gpu else f"torch: {name}", tid)


class _Recorded:
    """The run's own timeline around the profiled steps; empty if the recording can't be read, or telemetry is off."""

    def __init__(self, run: Path, marks: Mapping[int, PartClock]) -> None:
        self._marks = marks
        self._found: dict[int, tuple[list[Phase], list[Collective]]] = {}
        self._hellos: list[Hello] = []
        self.clocks = Clocks([])
        deadline = time.monotonic() + RECORDED_WITHIN_S
        while not self._read(run) and time.monotonic() < deadline:
            time.sleep(0.5)

    def _read(self, run: Path) -> bool:
        """Returns whether the recording has reached the end of the profile on every rank."""
        try:
            with RecordedTimeline(run) as timeline:
                end = timeline.end_wall_s
                # The profile has just ended, and telemetry keeps ten minutes whole.
                window = Window() if end is None else Window(timeline.complete_since_wall_s or 0.0)
                self._hellos, self.clocks = timeline.hellos, clocks_of(timeline, window)
                for rank in self._marks:
                    self._found[rank] = timeline.read(rank, window)
        except (OSError, sqlite3.Error):
            return False
        return all(self._reaches(rank) for rank in self._marks)

    def _reaches(self, rank: int) -> bool:
        phases = self._found[rank][0]
        return bool(phases) and phases[-1].end_ns >= self._marks[rank].last_ns

    def hello(self, rank: int) -> Hello | None:
        """The newest hello of a rank."""
        return next((one for one in reversed(self._hellos) if one.rank == rank), None)

    def around(self, rank: int) -> tuple[list[Phase], list[Collective]]:
        """The rank's phases and collectives of the profiled steps."""
        mark, hello = self._marks.get(rank), self.hello(rank)
        if mark is None or hello is None or rank not in self._found:
            return [], []
        begin, end, attempt = mark.first_ns, mark.last_ns, hello.attempt
        phases, collectives = self._found[rank]
        return (
            [one for one in phases if one.attempt == attempt and begin <= one.start_ns < end],
            [one for one in collectives if one.attempt == attempt and begin <= one.issue_ns < end],
        )

    def steps(self) -> tuple[int, int]:
        """The first and the last profiled step; zeros if they are not known."""
        known = [
            one.step for rank in self._marks for one in self.around(rank)[0] if one.name in ("forward", "backward")
        ]
        return (min(known), max(known)) if known else (0, 0)

    def shift_us(self, rank: int, path: Path, origin_ns: int) -> float:
        """What moves the times of a rank's part to the trace's. Raises ValueError if that is not known."""
        mark, hello = self._marks.get(rank), self.hello(rank)
        wall_ns = None
        if mark is not None and hello is not None:
            wall_ns = self.clocks.wall_ns(hello.attempt, rank, mark.offset_ns)
        if wall_ns is None:
            what = "has no mark of the clock" if mark is None else "is of a rank that the recording does not have"
            raise ValueError(f"{path.name} {what}")
        return (wall_ns - origin_ns) / 1000
