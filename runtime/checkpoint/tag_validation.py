"""One tag on all ranks for a checkpoint that a script saves: the config's checkpoint.tag_validation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from runtime.checkpoint.format.folder import script_tag
from runtime.checkpoint.format.manifest import CheckpointError, Misnamed
from runtime.comm import Comm

log = logging.getLogger("runtime.engine")


def validate_tag(comm: Comm, save_dir: str | Path | None, tag: Any, step: int, validation: str) -> str:
    """The tag that all ranks use: rank 0's. validation: "ignore", "warn" or "fail" if ranks pass different tags.
    Collective.

    Raises CheckpointError on all ranks for an unusable folder or tag (also a ValueError), or for different tags under
    "fail".
    """
    mine = script_tag(step) if tag in (None, "") else str(tag)
    problem = ""
    if save_dir is None or not str(save_dir):
        problem = f"save_checkpoint(save_dir={save_dir!r}): expected a folder"
    elif mine.startswith(".") or "/" in mine or "\0" in mine:
        problem = (
            f"save_checkpoint(tag={mine!r}): expected a folder name in {save_dir}, without slashes or a leading dot"
        )
    gathered = comm.gather_objects([problem, mine])
    if problems := [found for found, _ in gathered if found]:
        raise Misnamed(problems[0])
    first = str(gathered[0][1])
    different = next((f"{other!r} on rank {rank}" for rank, (_, other) in enumerate(gathered) if other != first), "")
    if different and validation != "ignore":
        text = f"save_checkpoint(tag=...): ranks pass different tags, {first!r} on rank 0 and {different}"
        if validation == "fail":
            raise CheckpointError(f"{text} (checkpoint.tag_validation is Fail)")
        if comm.rank == 0:
            log.warning(f"{text}: using rank 0's")
    return first
