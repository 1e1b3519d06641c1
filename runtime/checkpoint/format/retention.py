"""Which old checkpoints are deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

from runtime.checkpoint.format.folder import AUTOMATIC_PREFIX, complete_checkpoints


def prune(folder: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete automatic checkpoints except the `keep` newest and every `keep_every`-th one. Returns the deleted
    paths."""
    steps = [found for found in complete_checkpoints(folder) if found.path.name.startswith(AUTOMATIC_PREFIX)]
    gone = [
        found.path
        for found in steps[: max(0, len(steps) - keep)]
        if not (keep_every and found.number and found.number % keep_every == 0)
    ]
    for path in gone:
        doomed = path.with_name(f".{path.name}.pruned")
        path.rename(doomed)  # from here on readers ignore it
        shutil.rmtree(doomed)
    return gone
