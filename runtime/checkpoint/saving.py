"""Saving while training waits: the ranks write for themselves. (Beside training: background.py.)"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.common import manifest_of, merged, own_files, shared_files
from runtime.checkpoint.job import Job
from runtime.checkpoint.manifest import CheckpointError
from runtime.checkpoint.parts import blocks_of

if TYPE_CHECKING:
    from runtime.engine import Engine


def save(engine: Engine, folder: Path, tag: str, client_state: dict[str, Any]) -> Path:
    """Write FOLDER/TAG; every rank calls this at the same step. Returns the complete checkpoint's path.

    Raises CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    from runtime.checkpoint.writing import write

    engine.synchronize()
    views = [(part, block.view(at, part)) for block in blocks_of(engine) for at, part in block.parts]
    scalars = engine.comm.gather_objects([rule.scalars() for rule in engine.rules])
    job = make_job(engine, folder, tag, [part for part, _ in views], merged(scalars), client_state)
    write(job, lambda index: views[index][1], engine.comm)
    return job.final


def make_job(
    engine: Engine, folder: Path, tag: str, parts: Any, scalars: Any, client_state: dict[str, Any], **more: Any
) -> Job:
    """This rank's part of a checkpoint of this moment, without the tensors. What can't be saved is the job's
    problem."""
    files = own_files(engine)
    if engine.comm.rank != 0:
        return Job(folder, tag, parts, files, **more)
    manifest = manifest_of(engine).model_copy(update={"saved_wall_s": time.time()})
    try:
        files |= shared_files(engine, scalars, client_state)
    except CheckpointError as error:
        more["problem"] = str(error)
    return Job(folder, tag, parts, files, manifest, **more)
