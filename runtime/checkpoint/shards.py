"""Tensors as a checkpoint holds them: each rank's slice of each parameter, and torch's planners that write and read
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from runtime.checkpoint.manifest import CheckpointError

if TYPE_CHECKING:
    from runtime.engine import Engine


@dataclass(frozen=True)
class Piece:
    """A rank's slice of one parameter-sized tensor: `tensor` (numel,) are elements [start, start + numel) of
    `total`."""

    tensor: torch.Tensor
    start: int
    total: int

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        """A tensor that one rank writes and every rank reads; flattened (a copy where it is not contiguous)."""
        flat = tensor.detach().reshape(-1)
        return cls(flat, 0, flat.numel())

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([self.tensor.numel()]))


class SavePlanner(DefaultSavePlanner):
    """torch's planner asks tensors for their shards, which only its own distributed tensors can say; this one has the
    pieces."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, piece.chunk.offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        piece.chunk, TensorProperties.create_from_tensor(piece.tensor), torch.Size([piece.total])
                    ),
                )
                for name, piece in self.pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].tensor


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
                for item in create_read_items_for_chunk_list(name, known[name], [piece.chunk])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].tensor


def pieces_of(engine: Engine, own_range_only: bool) -> dict[str, Piece]:
    """Masters ("param.NAME") and optimizer states ("state.STATE.NAME") of this rank.

    Saving takes each rank's own range, also where all ranks hold everything; loading fills all that a rank holds.
    """
    pieces: dict[str, Piece] = {}
    for flat, rule in zip(engine.flats, engine.rules, strict=True):
        start, end = flat.layout.range(engine.comm.rank) if own_range_only else (flat.start, flat.end)
        states = list(rule.states())
        for part in flat.layout.slices(start, end):
            at = start - flat.start + part.range_start  # in the flat's state range
            pieces[f"param.{part.name}"] = Piece(flat.masters[at : at + part.numel], part.param_start, part.param_numel)
            for state in states:
                low = at - state.start
                if low >= 0 and low + part.numel <= state.tensor.numel():
                    held = state.tensor[low : low + part.numel]
                    pieces[f"state.{state.name}.{part.name}"] = Piece(held, part.param_start, part.param_numel)
    for flat in engine.frozen_flats:
        for part in flat.layout.slices(flat.start, flat.end):
            held = flat.own[part.range_start : part.range_start + part.numel]
            pieces[f"param.{part.name}"] = Piece(held, part.param_start, part.param_numel)
    return pieces


def whole_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """What all ranks hold alike and rank 0 writes: persistent buffers and frozen parameters. A frozen parameter has the
    same name as a trained one, so that it may be the other in the next attempt."""
    buffers = {f"buffer.{name}": buffer for name, buffer in persistent_buffers(engine.module).items()}
    return buffers | {f"param.{name}": parameter.data for name, parameter in engine.frozen}


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """By name; one that several modules share has its first name only, as parameters do."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found.setdefault(id(buffer), (f"{path}.{name}" if path else name, buffer))
    return dict(found.values())


def shapes_of(engine: Engine) -> dict[str, list[int]]:
    """The shape of every parameter by name."""
    in_units = {
        slot.name: list(slot.shape) for flat in (*engine.flats, *engine.frozen_flats) for slot in flat.layout.slots
    }
    return dict(sorted({**in_units, **{name: list(p.shape) for name, p in engine.frozen}}.items()))


def dtypes_of(engine: Engine) -> dict[str, torch.dtype]:
    """The dtype in which every parameter computes, by name."""
    in_units = {slot.name: flat.dtype for flat in (*engine.flats, *engine.frozen_flats) for slot in flat.layout.slots}
    return in_units | {name: parameter.dtype for name, parameter in engine.frozen}


def root_cause(error: BaseException) -> str:
    """torch wraps a rank's error in a CheckpointException with every rank's traceback; people need its last line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
