"""Writing the slices of one rank with torch.distributed.checkpoint's file writer. Not collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from runtime.checkpoint.format.slices import Part
from runtime.checkpoint.format.tensors import Row, StoredTensor


class _Planner(DefaultSavePlanner):
    """A planner that gets its write items from `parts`, where torch's asks distributed tensors for their shards, and
    calls `read(index)` for a part's elements when it is written."""

    def __init__(self, parts: Sequence[Part], read: Callable[[int], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts, self.read = list(parts), read
        self._index = {(part.name, part.start): index for index, part in enumerate(self.parts)}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_item(part) for part in self.parts])

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.read(self._index[index.fqn, index.offset[0]])


def _item(part: Part) -> WriteItem:
    chunk = ChunkStorageMetadata(offsets=torch.Size([part.start]), sizes=torch.Size([part.numel]))
    data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size([part.total]))
    return WriteItem(MetadataIndex(part.name, [part.start]), WriteItemType.SHARD, tensor_data=data)


def write_parts(folder: Path, rank: int, parts: Sequence[Part], read: Callable[[int], torch.Tensor]) -> list[Row]:
    """Write this rank's parts to FOLDER/__RANK_N.distcp. read(index): the elements of `parts[index]`, called when it is
    written. Returns the file location of each part."""
    planner = _Planner(parts, read)
    writer = FileSystemWriter(folder, sync_files=False)
    writer.set_up_storage_writer(is_coordinator=rank == 0)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]  # the rank is the index in this list
    with _no_checksums():
        results = writer.write_data(plan, planner).wait()
    kinds = {(part.name, part.start): part for part in parts}
    rows: list[Row] = []
    for result in results:
        assert result.index.offset is not None
        part, place = kinds[result.index.fqn, result.index.offset[0]], result.storage_data
        dtype = str(part.dtype).removeprefix("torch.")
        rows.append(
            (part.name, dtype, part.total, part.start, part.numel, place.relative_path, place.offset, place.length)
        )
    return rows


def write_torch_metadata(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write .metadata, the pickled index that torch.distributed.checkpoint's tools read; zerotop reads tensors.json."""
    described: dict[str, Any] = {}
    results = []
    for name, tensor in tensors.items():
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size([tensor.numel]),
            [ChunkStorageMetadata(torch.Size([p.start]), torch.Size([p.numel])) for p in tensor.parts],
        )
        results += [
            WriteResult(MetadataIndex(name, [p.start]), p.nbytes, _StorageInfo(p.file, p.offset, p.nbytes))
            for p in tensor.parts
        ]
    FileSystemWriter(folder, sync_files=False).finish(Metadata(described), [results])


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Skip CRC-32 checksums, which would double the cost; the manifest has SHA-256 digests."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
