"""Tensors as a checkpoint holds them: each rank's slices of each parameter. (Without
torch.distributed.checkpoint, which takes 48 MB: a rank whose writer process writes never imports it.)"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from runtime.checkpoint.buffers import ALIKE, Owners, buffers_of, key_of, own_buffers
from runtime.models.names import plain_name
from runtime.state.train_state import TrainState
from runtime.zero.flat import FlatParamGroup


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


@dataclass(frozen=True)
class Part:
    """What is written as one piece: elements [start, start + numel) of the `total` that tensor `name` has."""

    name: str
    start: int
    numel: int
    total: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def split(self, most: int) -> list[Part]:
        """In pieces of at most `most` elements."""
        return [
            replace(self, start=self.start + at, numel=min(most, self.numel - at)) for at in range(0, self.numel, most)
        ]


@dataclass
class Block:
    """Memory that a rank writes: `tensor` (1-D, contiguous) and the parts in it, each with its first element there."""

    tensor: torch.Tensor
    parts: list[tuple[int, Part]]
    flat: FlatParamGroup | None = None
    """Whose update changes it; None: nothing that training does while a checkpoint is being written."""
    stays: bool = False
    """It is in host memory because the config says so, or nothing ever changes it: no copy of all of it is made."""
    alike: bool = False
    """All ranks hold the same, and rank 0 writes it."""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def view(self, at: int, part: Part) -> torch.Tensor:
        return self.tensor[at : at + part.numel]


def blocks_of(state: TrainState, owners: Owners | None = ALIKE, with_frozen: bool = True) -> list[Block]:
    """What this rank writes, in the order of updates: masters ("param.NAME") and optimizer states
    ("state.STATE.NAME") of its own shards, frozen parameters if wanted, on rank 0 what all ranks hold alike, and
    buffers of its own. owners: see checkpoint/buffers.py; None: all that this rank might write."""
    rank, found = state.comm.rank, []
    for flat, optimizer in zip(state.flats, state.shard_optimizers, strict=True):
        start, end = flat.layout.shard(rank)
        low, high = start - flat.start, end - flat.start  # in the flat's state shard
        slices = flat.layout.slices(start, end)
        held = [("param", flat.masters, 0), *((f"state.{s.name}", s.tensor, s.start) for s in optimizer.states())]
        for kind, tensor, first in held:
            at, until = max(low, first), min(high, first + tensor.numel())
            parts = [
                (part.shard_start - (at - low), Part(f"{kind}.{part.name}", part.param_start, part.numel,
                                                     part.param_numel, tensor.dtype))
                for part in slices
                if low + part.shard_start >= at and low + part.shard_start + part.numel <= until
            ]  # fmt: skip
            if parts:
                found.append(Block(tensor[at - first : until - first], parts, flat, stays=flat.placement.offloaded))
    for flat in state.frozen_flats if with_frozen else ():
        start, end = flat.layout.shard(rank)
        own = flat.param_shard[start - flat.start : end - flat.start]
        parts = [
            (s.shard_start, Part(f"param.{s.name}", s.param_start, s.numel, s.param_numel, own.dtype))
            for s in flat.layout.slices(start, end)
        ]
        if parts:
            found.append(Block(own, parts, stays=True))
    alike = whole_tensors(state, with_frozen) if rank == 0 else {}
    for name, tensor in {**alike, **own_buffers(state, owners)}.items():
        whole = tensor.detach().reshape(-1)
        part = Part(name, 0, whole.numel(), whole.numel(), whole.dtype)
        found.append(Block(whole, [(0, part)], stays=name.startswith("param."), alike=rank == 0))
    return found


def pieces_of(state: TrainState) -> dict[str, Piece]:
    """All that this rank holds of masters and optimizer states, for reading into."""
    pieces: dict[str, Piece] = {}
    for flat, optimizer in zip(state.flats, state.shard_optimizers, strict=True):
        states = list(optimizer.states())
        for part in flat.layout.slices(flat.start, flat.end):
            at = part.shard_start  # in the flat's state shard
            pieces[f"param.{part.name}"] = Piece(flat.masters[at : at + part.numel], part.param_start, part.param_numel)
            for one in states:
                low = at - one.start
                if low >= 0 and low + part.numel <= one.tensor.numel():
                    held = one.tensor[low : low + part.numel]
                    pieces[f"state.{one.name}.{part.name}"] = Piece(held, part.param_start, part.param_numel)
    for flat in state.frozen_flats:
        for part in flat.layout.slices(flat.start, flat.end):
            held = flat.param_shard[part.shard_start : part.shard_start + part.numel]
            pieces[f"param.{part.name}"] = Piece(held, part.param_start, part.param_numel)
    return pieces


def whole_tensors(state: TrainState, with_frozen: bool = True) -> dict[str, torch.Tensor]:
    """What every rank has whole and rank 0 writes: persistent buffers and frozen parameters. A frozen parameter has the
    same name as a trained one, so that it may be the other in the next attempt."""
    buffers = {key_of(name): buffer for name, buffer in buffers_of(state).items()}
    return buffers | {f"param.{name}": parameter.data for name, parameter in state.frozen if with_frozen}


def shapes_of(state: TrainState) -> dict[str, list[int]]:
    """The shape of every parameter by name."""
    in_units = {
        slot.name: list(slot.shape) for flat in (*state.flats, *state.frozen_flats) for slot in flat.layout.slots
    }
    return dict(sorted({**in_units, **{name: list(p.shape) for name, p in state.frozen}}.items()))


def frozen_names(state: TrainState) -> list[str]:
    """Parameters that are not trained."""
    in_units = [slot.name for flat in state.frozen_flats for slot in flat.layout.slots]
    return [*(name for name, _ in state.frozen), *in_units]


def tied_names(state: TrainState) -> dict[str, str]:
    """Further names of parameters that several modules share, and the one that each has in a checkpoint."""
    known = shapes_of(state)
    names: dict[int, list[str]] = {}
    for name, parameter in state.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {
        name: first
        for several in names.values()
        for first in [next((name for name in several if name in known), None)]
        for name in several
        if first is not None and name != first
    }


def dtypes_of(state: TrainState) -> dict[str, torch.dtype]:
    """The dtype in which every parameter computes, by name."""
    in_units = {slot.name: flat.dtype for flat in (*state.flats, *state.frozen_flats) for slot in flat.layout.slots}
    return in_units | {name: parameter.dtype for name, parameter in state.frozen}
