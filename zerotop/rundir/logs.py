"""Log files: capped in size, and read from their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry

LOG_LIMIT_BYTES = 64 * 2**20
BLOCK_BYTES = 2**18
ERROR_LINES = 30
"""The most lines of a log that an error message repeats."""
_TAIL_BYTES = 64 * 1024


def rolled_part(path: Path) -> Path:
    """The file that keeps the end of a log that was emptied."""
    return path.with_name(path.name + ".1")


def cap_logs(folder: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> list[Path]:
    """Move the newest part of each log over the limit to NAME.1 and empty the log in place: its writer keeps it open
    for appending.

    Returns the logs that were emptied. Lines written between the two are lost, and the log says how many bytes that is.
    """
    capped = []
    for path in folder.glob("*.log"):
        try:
            size = path.stat().st_size
            if size <= limit_bytes:
                continue
            _keep_end(path, size, limit_bytes)
            lost = path.stat().st_size - size
            os.truncate(path, 0)
        except FileNotFoundError:
            continue
        if lost:
            with path.open("ab", buffering=0) as log:
                log.write(b"\nzerotop: this log was full, and %d bytes were lost here\n" % lost)
        capped.append(path)
    return capped


def _keep_end(path: Path, size: int, limit_bytes: int) -> None:
    """The last `limit_bytes` of `path` up to `size`, which its writer may have passed, in NAME.1 (0600)."""
    target = rolled_part(path)
    partial = path.with_name(path.name + ".new")  # whoever reads NAME.1 meanwhile goes on with the old one
    left = min(size, limit_bytes)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with path.open("rb") as lines, os.fdopen(descriptor, "wb") as kept:
        lines.seek(size - left)
        while left and (block := lines.read(min(BLOCK_BYTES, left))):
            kept.write(block)
            left -= len(block)
    os.replace(partial, target)


def newest_attempt(entry: RunEntry) -> Path:
    """The log folder of the newest attempt: a supervisor that restarts the ranks counts attempts on its own."""
    numbers = [int(folder.name) for folder in (entry.path / "logs").glob("*") if folder.name.isdecimal()]
    return entry.logs(max(numbers)) if numbers else entry.logs()


def find_log(run_path: Path, rank: int, attempt: int | None = None) -> Path | None:
    """The log file of a rank in this attempt, else in the newest that has one; None if there is none. One that has just
    been emptied for its size stands aside for its rolled part."""
    folders = [folder for folder in (run_path / "logs").glob("*") if folder.name.isdecimal()]
    folders.sort(key=lambda folder: (folder.name == str(attempt), int(folder.name)), reverse=True)
    for folder in folders:
        log = folder / f"rank-{rank}.log"
        rolled = rolled_part(log)
        if log.is_file():
            return log if log.stat().st_size or not rolled.is_file() else rolled
    return None


class LogTail:
    """One rank's log including its rolled part, read on from where the last read ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        number = path.stem.removeprefix("rank-")
        self.rank = int(number) if number.isdecimal() else 0
        """0 for the log of a command that has no ranks."""
        self._offset = 0
        self._rest: list[bytes] = []
        """The parts of a line whose end was not read yet."""

    def all_lines(self, *, at_end: bool) -> Iterator[str]:
        """Every complete line; `at_end` takes an unfinished last one as well."""
        rolled = rolled_part(self.path)
        if rolled.exists():
            yield from self._lines(rolled, 0)
        yield from self.new_lines(at_end=at_end)

    def last_lines(self, count: int, *, at_end: bool) -> list[str]:
        """The last `count` complete lines and some before them: whole blocks are read, from the end on."""
        blocks: list[bytes] = []
        ends = 0
        for path in (self.path, rolled_part(self.path)):
            if ends > count or not path.exists():
                break
            with path.open("rb") as log:
                position = log.seek(0, os.SEEK_END)
                if path == self.path:
                    self._offset = position
                while position and ends <= count:
                    size = min(BLOCK_BYTES, position)
                    position -= size
                    log.seek(position)
                    blocks.append(log.read(size))
                    ends += blocks[-1].count(b"\n")
        *lines, rest = b"".join(reversed(blocks)).split(b"\n")
        self._rest = [rest]
        if ends > count:
            del lines[0]  # its beginning may lie before what was read
        return [_text(line) for line in lines] + self._unfinished(at_end)

    def new_lines(self, *, at_end: bool) -> Iterator[str]:
        """Complete lines since the last read; `at_end` takes an unfinished last one as well."""
        if self.path.stat().st_size < self._offset:  # the size cap has emptied it
            self._offset, self._rest = 0, []
        yield from self._lines(self.path, self._offset)
        yield from self._unfinished(at_end)

    def _lines(self, path: Path, offset: int) -> Iterator[str]:
        with path.open("rb") as log:
            log.seek(offset)
            while block := log.read(BLOCK_BYTES):
                first, *others = block.split(b"\n")
                self._rest.append(first)
                for part in others:
                    yield _text(b"".join(self._rest))
                    self._rest = [part]
                self._offset = log.tell()

    def _unfinished(self, at_end: bool) -> list[str]:
        rest = b"".join(self._rest)
        if not at_end or not rest:
            return []
        self._rest = []
        return [_text(rest)]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")


def tail(path: Path, lines: int = ERROR_LINES) -> str:
    """The last lines of a text file; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
