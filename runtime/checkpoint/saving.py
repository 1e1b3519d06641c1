"""Saving while training waits: the ranks write for themselves. (Beside training: background.py.)"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.buffers import Owners, owners_of
from runtime.checkpoint.common import manifest_of, merged, own_files, own_scalars, shared_files
from runtime.checkpoint.job import Job
from runtime.checkpoint.manifest import CheckpointError
from runtime.checkpoint.parts import blocks_of

if TYPE_CHECKING:
    from runtime.engine import Engine


@dataclass(frozen=True)
class Options:
    """What a script may want of a checkpoint."""

    latest: bool = True
    """A resume may begin from it, and FOLDER/latest names it."""
    with_frozen: bool = True
    """Parameters that are not trained are in it."""


EVERYTHING = Options()


def save(engine: Engine, folder: Path, tag: str, client_state: dict[str, Any], options: Options = EVERYTHING) -> Path:
    """Write FOLDER/TAG; every rank calls this at the same step. Returns the complete checkpoint's path.

    Raises CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    from runtime.checkpoint.writing import write

    engine.synchronize()
    owners = owners_of(engine)
    blocks = blocks_of(engine, owners, options.with_frozen)
    views = [(part, block.view(at, part)) for block in blocks for at, part in block.parts]
    scalars = merged(engine.comm.gather_objects(own_scalars(engine)))
    job = make_job(engine, folder, tag, [part for part, _ in views], scalars, client_state, owners, options)
    write(job, lambda index: views[index][1], engine.comm)
    return job.final


def make_job(
    engine: Engine,
    folder: Path,
    tag: str,
    parts: Any,
    scalars: Any,
    client_state: dict[str, Any],
    owners: Owners,
    options: Options,
    **more: Any,
) -> Job:
    """This rank's part of a checkpoint of this moment, without the tensors. What can't be saved is the job's
    problem."""
    files = own_files(engine)
    if engine.comm.rank != 0:
        return Job(folder, tag, parts, files, **more)
    manifest = manifest_of(engine, owners, options.with_frozen)
    manifest = manifest.model_copy(update={"saved_wall_s": time.time(), "latest": options.latest})
    try:
        files |= shared_files(engine, scalars, client_state)
    except CheckpointError as error:
        more["problem"] = str(error)
    return Job(folder, tag, parts, files, manifest, **more)
