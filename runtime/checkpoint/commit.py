"""Writing a checkpoint together: every rank its parts, rank 0 the rest, and a rename that makes it complete.

The ranks themselves do this for engine.save_checkpoint(), their writer processes for what is saved beside training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from runtime.checkpoint.format import folder as folders
from runtime.checkpoint.format.legacy import METADATA
from runtime.checkpoint.format.manifest import MANIFEST, CheckpointError, FileRecord, record_of, root_cause
from runtime.checkpoint.format.shards import write_parts, write_torch_metadata
from runtime.checkpoint.format.tensors import INDEX, Row, index_of
from runtime.checkpoint.job import Job, Peers, on_rank_0

Records = dict[str, tuple[int, str]]
"""Size in bytes and SHA-256 of files, by name: plain, for they go from rank to rank."""


def write(job: Job, read: Callable[[int], torch.Tensor], peers: Peers) -> list[str]:
    """Write FOLDER/TAG; every rank calls this. read(index): the elements of a part, on the CPU or a device.

    Returns what went wrong afterwards, with the checkpoint complete (an old one could not be deleted). Raises
    CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    _agree(peers, job.problem, job)
    partial = folders.partial_of(job.folder, job.tag)
    on_rank_0(peers, f"create {partial}", lambda: folders.make_room(job.folder, job.tag))
    try:
        problem, rows, records = "", [], {}
        try:
            rows = write_parts(partial, peers.rank, job.parts, read)
            records = _write_files(job, partial, peers.rank)
        except Exception as error:  # any rank's failure must become every rank's
            problem = root_cause(error)
        _agree(peers, problem, job)
        gathered = peers.gather_objects([rows, records])
        on_rank_0(peers, f"complete {job.final}", lambda: _complete(job, partial, gathered))
    except BaseException:
        if peers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        folders.leave_room(partial)
    return _prune(job) if peers.rank == 0 else []


def _agree(peers: Peers, problem: str, job: Job) -> None:
    """A problem that any rank has is every rank's; so is another place than rank 0's, where half a checkpoint would
    be."""
    told = peers.gather_objects([problem, str(job.final.absolute())])
    first = told[0][1]
    for rank, (found, place) in enumerate(told):
        if found or place != first:
            why = found or f"it would write to {place}; give all ranks one folder"
            raise CheckpointError(f"could not write {first}: rank {rank}: {why}")


def _write_files(job: Job, partial: Path, rank: int) -> Records:
    """This rank's small files; and all of its files to the disk. Returns what they are."""
    for name, content in job.files.items():
        (partial / name).parent.mkdir(exist_ok=True, mode=0o700)
        (partial / name).write_bytes(content)
    records = _settle(partial, [*job.files, *(path.name for path in partial.glob(f"__{rank}_*"))])
    for parent in {(partial / name).parent for name in job.files} - {partial}:
        folders.sync(parent)
    return records


def _settle(partial: Path, names: Iterable[str]) -> Records:
    """Files to the disk; what they are."""
    records = {}
    for name in names:
        folders.sync(partial / name)
        record = record_of(partial / name)
        records[name] = (record.nbytes, record.sha256)
    return records


def _complete(job: Job, partial: Path, gathered: list[tuple[list[Row], Records]]) -> None:
    assert job.manifest is not None
    for rank, (_, found) in enumerate(gathered):
        for name, (nbytes, _sha256) in found.items():
            if not (partial / name).exists() or (partial / name).stat().st_size != nbytes:
                raise CheckpointError(f"{name} of rank {rank} is not there: save to a folder that all ranks share")
    index = index_of(row for rows, _ in gathered for row in rows)
    (partial / INDEX).write_bytes(index.encoded())
    write_torch_metadata(partial, index.tensors)
    records = _settle(partial, [INDEX, METADATA])
    files = {
        name: FileRecord(nbytes=nbytes, sha256=sha256)
        for found in (*(theirs for _, theirs in gathered), records)
        for name, (nbytes, sha256) in found.items()
    }
    manifest = job.manifest.model_copy(update={"number": folders.next_number(job.folder), "files": files})
    with (partial / MANIFEST).open("wb") as out:
        out.write(manifest.sealed())
        out.flush()
        os.fsync(out.fileno())
    folders.finish(job.folder, job.tag, manifest.latest)


def _prune(job: Job) -> list[str]:
    if not job.keep:
        return []
    try:
        folders.prune(job.folder, job.keep, job.keep_every)
    except (OSError, shutil.Error) as error:
        return [f"an old checkpoint could not be deleted: {error}"]
    return []
