"""Rows on their way to the process that encodes them.

Rows are numbered from 1 within their file: by line in JSONL, by record elsewhere. A chunk of JSONL is a range of bytes
that the process which encodes it reads and parses itself; other files are read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Chunk:
    """Some rows of a source: bytes of JSONL (`size` of them from `offset`, or `lines`), or parsed `rows`."""

    source: int
    form: str
    first: int
    """Number of the first row."""
    weight: int
    """Bytes of the source that it stands for, for the progress."""
    path: str = ""
    offset: int = 0
    size: int = 0
    lines: bytes | None = None
    rows: list[Mapping[str, Any]] | None = None
    split: bool = False
    """Whether overlong rows become several samples: true of text files, which are whole documents."""

    def numbered(self, broken: list[tuple[int, str]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """(number, row) of every row. Lines of JSONL that cannot be read are appended to `broken`."""
        if self.rows is not None:
            yield from enumerate(self.rows, self.first)
            return
        for number, line in enumerate(self._data().split(b"\n"), self.first):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            if not line or line.isspace():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                broken.append((number, f"not UTF-8 at byte {error.start + 1}"))
                continue
            except (ValueError, RecursionError) as error:
                broken.append((number, json_problem(error)))
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                broken.append((number, f"expected an object in braces, got {type(row).__name__}"))

    def _data(self) -> bytes:
        """The lines of JSONL."""
        if self.lines is not None:
            return self.lines
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def count(self) -> int:
        """How many rows it has, or lines."""
        if self.rows is not None:
            return len(self.rows)
        data = self._data()
        return data.count(b"\n") + (not data.endswith(b"\n"))

    def cut(self, rows: int) -> Chunk:
        """Its first rows."""
        if self.rows is not None:
            return replace(self, rows=self.rows[:rows])
        return replace(self, lines=b"\n".join(self._data().split(b"\n", rows)[:rows]))


def json_problem(error: Exception) -> str:
    """What is wrong with a text that is not JSON, and where."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error) or "nested too deeply"
