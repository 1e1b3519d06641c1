"""torch's planners for the parts of a checkpoint: what it writes and reads is 1-D slices of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from runtime.checkpoint.manifest import CheckpointError
from runtime.checkpoint.parts import Part, Piece


class SavePlanner(DefaultSavePlanner):
    """torch's planner asks tensors for their shards, which only its own distributed tensors can say; this one has the
    parts, and asks `read(index)` for a part's elements when it is written."""

    def __init__(self, parts: Sequence[Part], read: Callable[[int], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts, self.read = list(parts), read
        self._index = {(part.name, part.start): index for index, part in enumerate(self.parts)}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(part.name, torch.Size([part.start])),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _chunk(part.start, part.numel),
                        TensorProperties(dtype=part.dtype),
                        torch.Size([part.total]),
                    ),
                )
                for part in self.parts
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.read(self._index[index.fqn, index.offset[0]])


class LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: dict[str, Piece], strict: bool = True) -> None:
        """strict: every piece must be there; else those that aren't are left as they are."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces, self.strict = pieces, strict

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        known: dict[str, Any] = self.metadata.state_dict_metadata
        missing = [name for name in self.pieces if name not in known]
        if missing and self.strict:
            raise CheckpointError(
                f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        return LoadPlan(
            [
                item
                for name, piece in self.pieces.items()
                if name in known
                for item in create_read_items_for_chunk_list(
                    name, known[name], [_chunk(piece.start, piece.tensor.numel())]
                )
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].tensor


def _chunk(start: int, numel: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([numel]))
