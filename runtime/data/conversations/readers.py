"""Reads rows of sources, chunk by chunk."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from runtime.data import DataError
from runtime.data.conversations.chunks import Chunk, json_problem
from runtime.data.conversations.formats import recognise
from runtime.data.conversations.sources import Source, hub, library, opened, recognisable

CHUNK_BYTES = 2 << 20
CHUNK_ROWS = 2_000
_SNIFFED_ROWS = 20


@dataclass
class Reader:
    """Chunks of all sources in order, and the format that was recognised in each."""

    sources: Sequence[Source]
    named: str = "auto"
    forms: dict[int, str] = field(default_factory=dict)
    columns: dict[int, list[str]] = field(default_factory=dict)

    def chunks(self, first_source: int = 0, first_row: int = 1) -> Iterator[Chunk]:
        """All chunks from a row of a source on. Raises DataError for files that cannot be read or recognised."""
        for index in range(first_source, len(self.sources)):
            skip = first_row - 1 if index == first_source else 0
            try:
                yield from self._of(index, skip)
            except (OSError, EOFError) as error:
                source = self.sources[index]
                what = getattr(error, "strerror", None) or str(error)
                raise DataError(f"{source.key}: cannot read {source.name}: {what}") from None

    def _of(self, index: int, skip: int) -> Iterator[Chunk]:
        source = self.sources[index]
        if source.kind == "jsonl":
            yield from self._jsonl(index, skip)
            return
        split = source.kind == "text"
        rows: Iterator[Mapping[str, Any]] = iter(_rows(source))
        head = list(itertools.islice(rows, _SNIFFED_ROWS))
        form = self._recognise(index, head)
        rows = itertools.chain(head, rows)
        number = 1 + sum(1 for _ in itertools.islice(rows, skip))
        weight = 0
        while batch := list(itertools.islice(rows, 1 if split else CHUNK_ROWS)):
            if source.size:
                weight = source.size if split else 0
            yield Chunk(index, form, number, weight, rows=batch, split=split)
            number += len(batch)

    def _recognise(self, index: int, head: Sequence[Mapping[str, Any]]) -> str:
        columns = list(dict.fromkeys(key for row in head for key in row if isinstance(key, str)))
        self.columns[index] = columns
        source = self.sources[index]
        if not head:
            self.forms[index] = ""
            return "text"
        self.forms[index] = recognise(columns, "text" if source.kind == "text" else self.named, source.name)
        return self.forms[index]

    def _jsonl(self, index: int, skip: int) -> Iterator[Chunk]:
        source = self.sources[index]
        with opened(source.path) as file:
            head: list[Mapping[str, Any]] = []
            lines = []
            while len(head) < _SNIFFED_ROWS and (line := file.readline()):
                lines.append(line)
                if len(lines) > 1000:
                    break
                probe = Chunk(index, "", len(lines), 0, lines=line)
                head.extend(row for _, row in probe.numbered([]))
            form = self._recognise(index, head) if head or not lines else "messages"
            compressed = source.path.suffix.lower() in (".gz", ".zst")
            if not compressed:
                file.seek(0)
                yield from self._ranges(index, form, file, skip)
            else:
                yield from self._blocks(index, form, itertools.chain(lines, file), skip)

    def _ranges(self, index: int, form: str, file: BinaryIO, skip: int) -> Iterator[Chunk]:
        """Ranges of bytes that end with a line."""
        number, offset = 1, 0
        path = self.sources[index].name
        for _ in range(skip):
            line = file.readline()
            number, offset = number + 1, offset + len(line)
        while block := file.read(CHUNK_BYTES):
            if not block.endswith(b"\n"):
                block += file.readline()
            yield Chunk(index, form, number, len(block), path, offset, len(block))
            number += block.count(b"\n")
            offset += len(block)

    def _blocks(self, index: int, form: str, lines: Iterable[bytes], skip: int) -> Iterator[Chunk]:
        """Blocks of lines of a compressed file."""
        number = skip + 1
        some: list[bytes] = []
        size = 0
        for line in itertools.islice(lines, skip, None):
            some.append(line)
            size += len(line)
            if size >= CHUNK_BYTES:
                yield Chunk(index, form, number, 0, lines=b"".join(some))
                number, some, size = number + len(some), [], 0
        if some:
            yield Chunk(index, form, number, 0, lines=b"".join(some))


def _rows(source: Source) -> Iterator[Mapping[str, Any]]:
    return _READERS[source.kind](source)


def _json_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """An array of objects, or an object with one such array."""
    with opened(source.path) as file:
        data = file.read()
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source.key}: {source.name} is not UTF-8 at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{source.key}: {source.name} is not JSON: {line}{json_problem(error)}") from None
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        rows_of_its_own = not recognisable(content)
        content = lists[0] if rows_of_its_own and len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{source.key}: {source.name} holds {type(content).__name__}, expected an array of objects")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source.key}: {source.name}, row {number}: expected an object, got {type(row).__name__}")
        yield row


def _csv_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if ".tsv" in source.path.name.lower() else ","
    try:
        with opened(source.path) as file:
            reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter)
            for row in reader:
                yield {key: value for key, value in row.items() if key is not None and value is not None}
    except UnicodeDecodeError as error:
        raise DataError(f"{source.key}: {source.name} is not UTF-8: {error.reason}") from None
    except csv.Error as error:
        raise DataError(f"{source.key}: {source.name} is not CSV: {error}") from None


def _text_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """A text file is one document."""
    with opened(source.path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.key}: {source.name} is not UTF-8 at byte {error.start + 1}; expected text, or a file named "
            "*.jsonl, *.json, *.parquet or *.csv"
        ) from None
    yield {"text": text}


def _parquet_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    arrow = library("pyarrow", "Parquet files")
    parquet = library("pyarrow.parquet", "Parquet files")
    try:
        with parquet.ParquetFile(source.name) as file:
            for batch in file.iter_batches(batch_size=CHUNK_ROWS):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise DataError(f"{source.key}: {source.name} is not a Parquet file: {error}") from None


def _hub_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    yield from hub(source)


_READERS = {
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
    "hub": _hub_rows,
}
