"""Writing a checkpoint: every rank writes its slices, rank 0 the index and manifest, and a rename completes it.

Called by the ranks themselves for engine.save_checkpoint(), and by their writer processes for asynchronous saves, which
is why it is torch-free.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from runtime.checkpoint.format import folder as folders
from runtime.checkpoint.format.legacy import METADATA
from runtime.checkpoint.format.manifest import MANIFEST, CheckpointError, FileRecord, Manifest, record_of, root_cause
from runtime.checkpoint.format.retention import prune
from runtime.checkpoint.format.shard_writer import write_parts, write_torch_metadata
from runtime.checkpoint.format.tensors import INDEX, Row, StoredTensor, index_of
from runtime.checkpoint.saving.job import Job, Peers, on_rank_0

Records = dict[str, tuple[int, str]]
"""File name -> size in bytes and SHA-256; plain types, as ranks send them to each other."""


def write(job: Job, read: Callable[[int], memoryview], peers: Peers) -> list[str]:
    """Write FOLDER/TAG. read(index): returns the bytes of `job.parts[index]`. Collective.

    Returns warnings about what failed after the checkpoint was complete (an old one could not be deleted). Raises
    CheckpointError on every rank if any rank fails to write; no partial checkpoint is left behind.
    """
    _agree(peers, job.problem, job)
    partial = folders.partial_of(job.folder, job.tag)
    on_rank_0(peers, f"create {partial}", lambda: folders.claim_partial(job.folder, job.tag))
    try:
        problem, rows, records = "", [], {}
        try:
            rows = write_parts(partial, peers.rank, job.parts, _without_nan(job, read) if job.refuses_nan else read)
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
        folders.release_partial(partial)
    return _prune(job) if peers.rank == 0 else []


def _without_nan(job: Job, read: Callable[[int], memoryview]) -> Callable[[int], memoryview]:
    """`read`, which raises CheckpointError for a parameter with NaN."""

    def checked(index: int) -> memoryview:
        content, part = read(index), job.parts[index]
        if part.name.startswith("param.") and _holds_nan(content, part.dtype):
            raise CheckpointError(
                f"parameter {part.name.removeprefix('param.')} holds NaN: the checkpoint would be of no use"
            )
        return content

    return checked


def _holds_nan(content: memoryview, dtype: str) -> bool:
    """Whether a tensor with these bytes holds NaN; 8-bit dtypes are not looked at."""
    import numpy as np  # only adapters need it

    if dtype == "bfloat16":
        bits = np.frombuffer(content, np.uint16)
        return bool(((bits & 0x7FFF) > 0x7F80).any())
    return dtype in ("float16", "float32", "float64") and bool(np.isnan(np.frombuffer(content, dtype)).any())


def _check_complete(manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError unless every parameter of the manifest has been written in full, and once."""
    excluded = set(manifest.excluded)
    for name, shape in manifest.shapes.items():
        if name in excluded:
            continue
        at, found = 0, tensors.get(f"param.{name}")
        for part in found.parts if found is not None else ():
            if part.start != at or part.nbytes < part.numel:
                break
            at += part.numel
        if at != math.prod(shape):
            raise CheckpointError(f"parameter {name} has {at:,} of {math.prod(shape):,} elements in the files")


def _agree(peers: Peers, problem: str, job: Job) -> None:
    """Raise CheckpointError on every rank if any rank reports a problem or would write to another folder than rank
    0."""
    reports = peers.gather_objects([problem, str(job.final.absolute())])
    first = reports[0][1]
    for rank, (found, place) in enumerate(reports):
        if found or place != first:
            why = found or f"it would write to {place}; pass the same save_dir on every rank"
            raise CheckpointError(f"could not write {first}: rank {rank}: {why}")


def _write_files(job: Job, partial: Path, rank: int) -> Records:
    """Write this rank's small files and fsync all of its files. Returns their sizes and digests."""
    for name, content in job.files.items():
        (partial / name).parent.mkdir(exist_ok=True, mode=0o700)
        (partial / name).write_bytes(content)
    records = _sync_files(partial, [*job.files, *(path.name for path in partial.glob(f"__{rank}_*"))])
    for parent in {(partial / name).parent for name in job.files} - {partial}:
        folders.sync(parent)
    return records


def _sync_files(partial: Path, names: Iterable[str]) -> Records:
    """Fsync files; returns their sizes and digests."""
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
                raise CheckpointError(
                    f"rank 0 does not see {name} of rank {rank}: save to a file system that all ranks share"
                )
    index = index_of(row for rows, _ in gathered for row in rows)
    _check_complete(job.manifest, index.tensors)
    (partial / INDEX).write_bytes(index.encoded())
    write_torch_metadata(partial, index.tensors)
    records = _sync_files(partial, [INDEX, METADATA])
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
        prune(job.folder, job.keep, job.keep_every)
    except (OSError, shutil.Error) as error:
        return [f"an old checkpoint could not be deleted: {error}"]
    return []
