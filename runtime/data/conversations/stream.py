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

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import DataError
from runtime.data.cache import Log
from runtime.data.conversations import worker
from runtime.data.conversations.build import build_store
from runtime.data.conversations.chunks import Chunk
from runtime.data.conversations.encode import Recipe
from runtime.data.conversations.readers import Reader
from runtime.data.conversations.sources import Source
from runtime.data.conversations.store import Store


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
    """Prepares segments in one process beside this one, in the order in which they are asked for."""

    def __init__(self, spec: StreamSpec) -> None:
        self._spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: Cursor | None = None
        """The segment that the process is at work on."""

    def begin(self, cursor: Cursor) -> None:
        """Have a segment prepared in the background."""
        if self._asked == cursor:
            return
        if self._asked is not None:
            self._answer()
        if self._process is None:
            command = [sys.executable, "-P", "-m", "runtime.data.conversations.stream"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._send(self._spec)
        self._send(cursor)
        self._asked = cursor

    def take(self, cursor: Cursor) -> Store:
        """A segment, as soon as it is ready. Raises DataError if it cannot be prepared."""
        self.begin(cursor)
        if error := self._answer():
            raise DataError(error)
        return Store(self._spec.folder(cursor))

    def discard(self, cursor: Cursor) -> None:
        """Delete a segment."""
        folder = self._spec.folder(cursor)
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = self._asked = None

    def _send(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # _answer says that the process is gone
            worker.send(self._process.stdin, message)  # type: ignore[arg-type]

    def _answer(self) -> str:
        """What went wrong with the segment at work; empty if nothing did."""
        assert self._process is not None and self._process.stdout is not None
        self._asked = None
        try:
            error: str = worker.receive(self._process.stdout)  # type: ignore[arg-type]
        except EOFError:
            code = self._process.wait()
            return f"the process that prepares streamed data ended with exit code {code}; its message is above"
        return error


def main() -> None:
    """Prepare segments until stdin ends; what went wrong is the answer to each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between answers
    with contextlib.suppress(EOFError):
        spec: StreamSpec = worker.receive(source)  # type: ignore[arg-type]
        while True:
            cursor: Cursor = worker.receive(source)  # type: ignore[arg-type]
            error = ""
            try:
                build_segment(spec, cursor, lambda line: None)
            except DataError as problem:
                error = str(problem)
            worker.send(sink, error)


if __name__ == "__main__":
    main()
