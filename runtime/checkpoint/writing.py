"""Writing a checkpoint together: every rank its parts, rank 0 the rest, and a rename that makes it complete.

The ranks themselves do this for engine.save_checkpoint(), their writer processes for what is saved beside training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.serialization import get_crc32_options, set_crc32_options

from runtime.checkpoint import folder as folders
from runtime.checkpoint.job import Job, Peers, on_rank_0
from runtime.checkpoint.manifest import MANIFEST, CheckpointError, FileRecord, record_of, root_cause
from runtime.checkpoint.shards import SavePlanner

METADATA = ".metadata"


def write(job: Job, read: Callable[[int], torch.Tensor], peers: Peers, group: dist.ProcessGroup | None) -> list[str]:
    """Write FOLDER/TAG; every rank calls this. read(index): the elements of a part, on the CPU or a device.

    Returns what went wrong afterwards, with the checkpoint complete (an old one could not be deleted). Raises
    CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    _agree(peers, job.problem, job)
    partial = folders.partial_of(job.folder, job.tag)
    on_rank_0(peers, f"create {partial}", lambda: folders.make_room(job.folder, job.tag))
    try:
        problem, records = "", {}
        try:
            _write_tensors(job, partial, read, group)
            records = _write_files(job, partial, peers.rank)
        except (Exception, CheckpointException) as error:  # any rank's failure must become every rank's
            problem = root_cause(error)
        _agree(peers, problem, job)
        gathered = peers.gather_objects({name: record.model_dump() for name, record in records.items()})
        on_rank_0(peers, f"complete {job.final}", lambda: _complete(job, partial, gathered))
    except BaseException:
        if peers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        folders.leave_room(partial)
    return _prune(job) if peers.rank == 0 else []


def _agree(peers: Peers, problem: str, job: Job) -> None:
    problems = [f"rank {rank}: {p}" for rank, p in enumerate(peers.gather_objects(problem)) if p]
    if problems:
        raise CheckpointError(f"could not write {job.final}: {problems[0]}")


def _write_tensors(
    job: Job, partial: Path, read: Callable[[int], torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    checksums = get_crc32_options()
    set_crc32_options(False)  # the manifest's say more, and cost as much again
    try:
        state_dict_saver.save(
            {},
            storage_writer=FileSystemWriter(partial, sync_files=False),
            planner=SavePlanner(job.parts, read),
            process_group=group,
        )
    finally:
        set_crc32_options(checksums)


def _write_files(job: Job, partial: Path, rank: int) -> dict[str, FileRecord]:
    """This rank's small files; and all of its files to the disk. Returns what they are."""
    for name, content in job.files.items():
        (partial / name).parent.mkdir(exist_ok=True, mode=0o700)
        (partial / name).write_bytes(content)
    names = [*job.files, *(path.name for path in partial.glob(f"__{rank}_*"))]
    if rank == 0:
        names.append(METADATA)
    records = {}
    for name in names:
        folders.sync(partial / name)
        records[name] = record_of(partial / name)
    for parent in {(partial / name).parent for name in job.files} - {partial}:
        folders.sync(parent)
    return records


def _complete(job: Job, partial: Path, records: list[dict[str, dict[str, Any]]]) -> None:
    assert job.manifest is not None
    files = {name: FileRecord.model_validate(record) for by_rank in records for name, record in by_rank.items()}
    manifest = job.manifest.model_copy(update={"number": folders.next_number(job.folder), "files": files})
    with (partial / MANIFEST).open("wb") as out:
        out.write(manifest.sealed())
        out.flush()
        os.fsync(out.fileno())
    folders.finish(job.folder, job.tag)


def _prune(job: Job) -> list[str]:
    if not job.keep:
        return []
    try:
        folders.prune(job.folder, job.keep, job.keep_every)
    except (OSError, shutil.Error) as error:
        return [f"an old checkpoint could not be deleted: {error}"]
    return []
