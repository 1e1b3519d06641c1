"""Writes a trace file in the Trace Event Format (JSON), which Perfetto (ui.perfetto.dev) and chrome://tracing read.

Events are written one by one, so that a trace of any size takes little memory. One process track per rank; in it, named
tracks on which no two slices overlap.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

Stream = IO[bytes] | gzip.GzipFile
RUN_PID = 1
"""The process track of the run as a whole."""
FIRST_RANK_PID = 10
LEVEL = 4
"""Of compression: a third of the time of the default, and files a tenth larger."""

WRITTEN_AT_ONCE = 1000
"""Events that are joined before they are compressed."""
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def rank_pid(rank: int) -> int:
    """The process track of a rank."""
    return FIRST_RANK_PID + rank


class TraceWriter:
    """Writes events to a stream. Times are nanoseconds since the origin that `finish` names in the metadata."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: list[str] = []
        self._separator = ""
        self._ends: dict[tuple[int, int], int] = {}
        self.slices = 0
        """Slices written so far."""
        stream.write(b'{"traceEvents":[\n')

    def raw(self, event: Mapping[str, Any]) -> None:
        """Write an event as it is."""
        self._waiting.append(_encode(event))
        if len(self._waiting) >= WRITTEN_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._stream.write((self._separator + ",\n".join(self._waiting)).encode())
            self._separator = ",\n"
            self._waiting.clear()

    def process(self, pid: int, name: str, order: int) -> None:
        """Name a process track. order: its place among the others."""
        self._name("process_name", pid, 0, {"name": name})
        self._name("process_sort_index", pid, 0, {"sort_index": order})

    def track(self, pid: int, tid: int, name: str, order: int) -> None:
        """Name a track of a process."""
        self._name("thread_name", pid, tid, {"name": name})
        self._name("thread_sort_index", pid, tid, {"sort_index": order})

    def _name(self, what: str, pid: int, tid: int, arguments: dict[str, Any]) -> None:
        self.raw({"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": arguments})

    def slice(self, pid: int, tid: int, name: str, start_ns: int, end_ns: int, category: str, **arguments: Any) -> None:
        """Write a slice. Slices of a track come in the order of their starts; one that begins before the end of the one
        before (clocks of callbacks differ by microseconds) is cut there."""
        start_ns = max(start_ns, self._ends.get((pid, tid), start_ns))
        end_ns = max(start_ns, end_ns)
        self._ends[pid, tid] = end_ns
        event: dict[str, Any] = {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid}
        event |= {"ts": start_ns / 1000, "dur": (end_ns - start_ns) / 1000}
        self.raw(event | ({"args": arguments} if arguments else {}))
        self.slices += 1

    def instant(self, pid: int, tid: int, name: str, at_ns: int, **arguments: Any) -> None:
        """Write a mark."""
        self.raw({"ph": "i", "s": "p", "name": name, "pid": pid, "tid": tid, "ts": at_ns / 1000, "args": arguments})

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write the end of the file."""
        self._flush()
        self._stream.write(b'\n],"displayTimeUnit":"ms","metadata":' + json.dumps(metadata).encode() + b"}\n")


@contextlib.contextmanager
def trace_file(path: Path) -> Iterator[Stream]:
    """A stream whose content becomes the file `path`, compressed if its name ends with .gz. The file appears when it is
    complete, and not at all after an exception."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw:
            with compressed(raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as stream:
                yield stream
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def compressed(raw: IO[bytes]) -> gzip.GzipFile:
    """A stream that writes gzip to `raw`."""
    return gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=LEVEL, mtime=0)


def open_trace(path: Path) -> Stream:
    """A trace file for reading, compressed or not."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
