"""One folder and one tag on all ranks for a checkpoint that a script saves: the config's checkpoint.tag_validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.checkpoint.format.folder import script_tag
from runtime.checkpoint.format.manifest import CheckpointError, Misnamed
from runtime.comm import Comm

log = logging.getLogger("runtime.engine")


def validate_place(comm: Comm, save_dir: str | Path | None, tag: Any, step: int, validation: str) -> tuple[Path, str]:
    """(folder, tag) that all ranks use: rank 0's. validation: "ignore", "warn" or "fail" if ranks pass different ones.
    Collective.

    Raises CheckpointError on all ranks for an unusable folder or tag (also a ValueError), or for different ones under
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
    gathered = comm.gather_objects([problem, str(save_dir), mine])
    if problems := [found for found, *_ in gathered if found]:
        raise Misnamed(problems[0])
    _, folders, tags = zip(*gathered, strict=True)
    for argument, what, values in (("save_dir", "folders", folders), ("tag", "tags", tags)):
        _check_equal(values, argument, what, validation, comm.rank)
    return Path(folders[0]), str(tags[0])


def _check_equal(values: Sequence[Any], argument: str, what: str, validation: str, rank: int) -> None:
    """Warn, or raise CheckpointError, if ranks pass different values."""
    different = next((f"{other!r} on rank {at}" for at, other in enumerate(values) if other != values[0]), "")
    if not different or validation == "ignore":
        return
    text = f"save_checkpoint({argument}=...): ranks pass different {what}, {values[0]!r} on rank 0 and {different}"
    if validation == "fail":
        raise CheckpointError(f"{text} (checkpoint.tag_validation is Fail)")
    if rank == 0:
        log.warning(f"{text}: using rank 0's")
