"""Data in segments: each is read and tokenized by a process beside the training on the one before it.

[Note: the stream]
A segment is `zerotop.data.segment_rows` rows of the sources, from a cursor on; the one after the last row begins with
the first one again. Its sequences, in an order of its own, follow those of the segment before it in one endless stream,
of which step s takes `global_batch` from number s * global_batch on. How many sequences a segment has is known when it
is prepared, so the stream's state is where the last few segments begin: number, first sequence, cursor. From there any
later step is found again, and an earlier one from the beginning.

Every rank asks for every segment; on one node the first to ask prepares it and the others wait (build.py's lock). What
lies two segments back is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import DataError
from runtime.data.cache import Log
from runtime.data.conversations import worker
from runtime.data.conversations.build import build_store
from runtime.data.conversations.encode import Recipe
from runtime.data.conversations.readers import Chunk, Reader
from runtime.data.conversations.sources import Source
from runtime.data.conversations.store import Store, read_meta


class Cursor(NamedTuple):
    """A row of the sources. `row`: its number, from 1."""

    source: int = 0
    row: int = 1


@dataclass(frozen=True)
class StreamSpec:
    """What segments are made of. `digest`: of sources and recipe."""

    sources: tuple[Source, ...]
    form: str
    recipe: Recipe
    rows: int
    workers: int
    cache: str
    digest: str

    def folder(self, cursor: Cursor) -> Path:
        """Where the segment that begins at a cursor is kept."""
        name = hashlib.blake2b(f"{self.digest}\0{self.rows}\0{cursor}".encode(), digest_size=16).hexdigest()
        return Path(self.cache) / f"segment-{name}"


def build_segment(spec: StreamSpec, cursor: Cursor, log: Log) -> Store:
    """The store of the segment that begins at a cursor, built here if it does not exist yet. It may be empty."""
    reader = Reader(spec.sources, spec.form)
    end: dict[str, Any] = {}
    chunks = _segment(reader, cursor, spec.rows, end)
    return build_store(spec.folder(cursor), reader, spec.recipe, spec.workers, log, chunks, end)


def next_cursor(store: Store) -> tuple[Cursor, bool]:
    """(where the next segment begins, whether that is the beginning of the data)."""
    source, row = store.meta["next"]
    return Cursor(source, row), store.meta["ends"]


def _segment(reader: Reader, cursor: Cursor, rows: int, end: dict[str, Any]) -> Iterator[Chunk]:
    """The chunks of a segment. `end` gets the next cursor."""
    end.update(next=list(Cursor()), ends=True)
    left = rows
    for chunk in reader.chunks(cursor.source, cursor.row):
        if left <= 0:
            end.update(next=[chunk.source, chunk.first], ends=False)
            return
        count = chunk.count()
        if count > left:
            yield chunk.cut(left)
            end.update(next=[chunk.source, chunk.first + left], ends=False)
            return
        left -= count
        yield chunk


class Segment(NamedTuple):
    """Where a segment begins. `first`: number of its first sequence in the stream; `epoch`: passes before it."""

    number: int
    first: int
    cursor: Cursor
    epoch: int


class SegmentQueue:
    """Prepares segments in processes of their own, one ahead."""

    def __init__(self, spec: StreamSpec, log: Log) -> None:
        self._spec, self._log = spec, log
        self._process: tuple[Cursor, subprocess.Popen[bytes]] | None = None
        self._lock = threading.Lock()

    def begin(self, cursor: Cursor) -> None:
        """Have a segment prepared in the background."""
        with self._lock:
            if self._process is not None and self._process[0] == cursor:
                return
            self._end()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.data.conversations.stream"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert process.stdin is not None
            worker.send(process.stdin, (self._spec, cursor))  # type: ignore[arg-type]
            process.stdin.close()
            self._process = (cursor, process)

    def take(self, cursor: Cursor) -> Store:
        """A segment, as soon as it is ready. Raises DataError if it cannot be prepared."""
        self.begin(cursor)
        with self._lock:
            assert self._process is not None
            process = self._process[1]
            assert process.stdout is not None
            answer = process.stdout.read()
            process.wait()
            process.stdout.close()
            self._process = None
        message = json.loads(answer) if answer else {"error": f"preparing data ended with exit code {process.returncode}"}
        if message["error"]:
            raise DataError(message["error"])
        return Store(self._spec.folder(cursor))

    def discard(self, cursor: Cursor) -> None:
        """Delete a segment."""
        folder = self._spec.folder(cursor)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        """End the process that prepares a segment."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            process = self._process[1]
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            self._process = None


def main() -> None:
    """Prepare the segment that stdin names; one JSON object on stdout says how it went."""
    spec, cursor = worker.receive(sys.stdin.buffer)  # type: ignore[arg-type]
    error = ""
    try:
        build_segment(spec, cursor, lambda line: None)
        read_meta(spec.folder(cursor))
    except DataError as problem:
        error = str(problem)
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    main()
