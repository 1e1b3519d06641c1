"""Which files of a run directory go into the report, and how much of each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zerotop.rundir.logs import rolled_part

HEAD_BYTES, TAIL_BYTES = 32 * 1024, 512 * 1024
"""Of a log: its beginning, and its end."""
LOGS_BYTES = 24 * 2**20
"""Of all logs of an attempt together; with many ranks the ends are shorter."""
LEAST_TAIL_BYTES = 8 * 1024
EVIDENCE_BYTES, EVIDENCE_TOTAL_BYTES = 4 * 2**20, 32 * 2**20
ATTEMPTS_KEPT = 4
"""Attempts whose files are packed: the first, and the newest ones."""
_PLAIN = ("run.json", "state.json", "config.json", "resolved.json")


@dataclass(frozen=True)
class Part:
    """One file of the report. `of_bytes`: size of the original, if only a part of it was taken."""

    name: str
    content: bytes
    of_bytes: int = 0

    @property
    def is_json(self) -> bool:
        """Whether it is one JSON document."""
        return self.name.endswith(".json")


def run_files(run: Path) -> Iterator[Part]:
    """The files of the run directory `run`, without its recording and checkpoints. Files that are missing, or go away
    meanwhile, are passed over; links are not followed."""
    for name in _PLAIN:
        yield from _part(run / name, name, 0, EVIDENCE_BYTES)
    for folder in _attempts(run):
        logs = sorted(path for path in folder.glob("*.log") if path.is_file())
        logs += [rolled for path in logs if (rolled := rolled_part(path)).exists()]
        tail = max(LEAST_TAIL_BYTES, min(TAIL_BYTES, LOGS_BYTES // max(1, len(logs))))
        for path in logs:
            yield from _part(path, f"logs/{folder.name}/{path.name}", min(HEAD_BYTES, tail // 4), tail)
        left = EVIDENCE_TOTAL_BYTES
        for path in sorted(_evidence(folder), key=_age):
            for part in _part(path, f"logs/{folder.name}/{path.relative_to(folder)}", 0, min(left, EVIDENCE_BYTES)):
                left = max(0, left - len(part.content))
                yield part


def _attempts(run: Path) -> list[Path]:
    folders = [path for path in (run / "logs").glob("*") if path.name.isdecimal() and path.is_dir()]
    folders.sort(key=lambda path: int(path.name))
    return folders if len(folders) <= ATTEMPTS_KEPT else [folders[0], *folders[1 - ATTEMPTS_KEPT :]]


def _evidence(folder: Path) -> Iterator[Path]:
    for pattern in ("stacks-*.txt", "flight-rank-*.json", "evidence-*/*", "notes.json"):
        for path in folder.glob(pattern):
            if path.is_file() and not path.parent.is_symlink():
                yield path


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0


def _part(path: Path, name: str, head: int, tail: int) -> Iterator[Part]:
    """The beginning and the end of a file, cut at line ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size <= head + tail:
            yield Part(name, file.read(head + tail))
            return
        begin = file.read(head).rpartition(b"\n")[0]
        file.seek(size - tail)
        end = file.read(tail).partition(b"\n")[2]
        gap = f"\n... {size - len(begin) - len(end)} bytes left out ...\n".encode()
        yield Part(name, begin + gap + end if begin else gap.lstrip() + end, size)
