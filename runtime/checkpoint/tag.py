"""The tag of a checkpoint that a script saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from runtime.checkpoint.format.folder import script_tag
from runtime.checkpoint.format.manifest import CheckpointError, Misnamed
from runtime.comm import Comm

log = logging.getLogger("runtime.engine")


def agreed_tag(comm: Comm, save_dir: str | Path | None, tag: Any, step: int, validation: str) -> str:
    """One tag for all ranks. validation: "ignore", "warn" or "fail", where the ranks say different ones. Collective.

    Raises CheckpointError on all ranks for what can't be a folder or a tag (a ValueError, too), or for different tags
    under "fail".
    """
    mine = script_tag(step) if tag in (None, "") else str(tag)
    problem = ""
    if save_dir is None or not str(save_dir):
        problem = f"save_checkpoint(save_dir={save_dir!r}): expected a folder"
    elif mine.startswith(".") or "/" in mine or "\0" in mine:
        problem = (
            f"save_checkpoint(tag={mine!r}): expected the name of a folder in {save_dir}, without / or a dot first"
        )
    told = comm.gather_objects([problem, mine])
    if problems := [found for found, _ in told if found]:
        raise Misnamed(problems[0])
    first = str(told[0][1])
    different = next((f"{other!r} on rank {rank}" for rank, (_, other) in enumerate(told) if other != first), "")
    if different and validation != "ignore":
        text = f"save_checkpoint(tag=...): the ranks say different tags, {first!r} on rank 0 and {different}"
        if validation == "fail":
            raise CheckpointError(f"{text} (checkpoint.tag_validation is Fail)")
        if comm.rank == 0:
            log.warning(f"{text}: rank 0's is taken")
    return first
