"""Keep a run's logs from filling the disk."""

from __future__ import annotations

import os
from pathlib import Path

LOG_LIMIT_BYTES = 64 * 2**20


def cap_logs(folder: Path, limit_bytes: int = LOG_LIMIT_BYTES) -> list[Path]:
    """Move the newest part of each log over the limit to NAME.1 and empty it in place, since its writer keeps it open
    (for appending).

    Returns the logs that were emptied. What is written in the moment between the two is lost.
    """
    capped = []
    for path in folder.glob("*.log"):
        try:
            size = path.stat().st_size
            if size <= limit_bytes:
                continue
            _copy_end(path, path.with_name(path.name + ".1"), size - limit_bytes)
            os.truncate(path, 0)
        except FileNotFoundError:
            continue
        capped.append(path)
    return capped


def _copy_end(source: Path, target: Path, start: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with source.open("rb") as lines, os.fdopen(descriptor, "wb") as kept:
        lines.seek(start)
        while block := lines.read(2**20):
            kept.write(block)
