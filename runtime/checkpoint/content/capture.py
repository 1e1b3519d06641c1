"""The slices of parameters, optimizer states and buffers that each rank writes and reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.checkpoint.content.buffers import REPLICATED, BufferOwners, buffer_key, buffers_of, own_buffers
from runtime.checkpoint.format.slices import Part, Piece
from runtime.models.names import plain_name
from runtime.state.train_state import TrainState
from runtime.zero.flat import FlatParamGroup


@dataclass
class Block:
    """Memory that a rank writes: a contiguous 1-D `tensor`, and its parts with the index of their first element."""

    tensor: torch.Tensor
    parts: list[tuple[int, Part]]
    flat: FlatParamGroup | None = None
    """The flat parameter group whose optimizer step changes this memory; None where no optimizer step does."""
    streamed: bool = False
    """Written piece by piece from where it is instead of being copied first: offloaded states, and frozen
    parameters."""
    replicated: bool = False
    """Every rank holds the same values, and rank 0 writes them."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    def view(self, at: int, part: Part) -> torch.Tensor:
        """(part.numel,): the elements of `part`, whose first one is `tensor[at]`."""
        return self.tensor[at : at + part.numel]


def blocks_of(state: TrainState, owners: BufferOwners | None = REPLICATED, with_frozen: bool = True) -> list[Block]:
    """Everything that this rank writes, in the order of the optimizer step: master weights ("param.NAME") and optimizer
    states ("state.STATE.NAME") of its shards, frozen parameters if `with_frozen`, `replicated_tensors` on rank 0, and
    buffers that differ on this rank (`owners`, see buffers.py; None: every buffer that might)."""
    rank, found = state.comm.rank, []
    for flat, optimizer in zip(state.flats, state.shard_optimizers, strict=True):
        start, end = flat.layout.shard(rank)
        low, high = start - flat.start, end - flat.start  # relative to the group's state shard
        slices = flat.layout.slices(start, end)
        held = [("param", flat.masters, 0), *((f"state.{s.name}", s.tensor, s.start) for s in optimizer.states())]
        for kind, tensor, first in held:
            at, until = max(low, first), min(high, first + tensor.numel())
            parts = [
                (part.shard_start - (at - low), Part.of(tensor, f"{kind}.{part.name}", part.param_start, part.numel,
                                                        part.param_numel))
                for part in slices
                if low + part.shard_start >= at and low + part.shard_start + part.numel <= until
            ]  # fmt: skip
            if parts:
                found.append(Block(tensor[at - first : until - first], parts, flat, streamed=flat.placement.offloaded))
    for flat in state.frozen_flats if with_frozen else ():
        start, end = flat.layout.shard(rank)
        own = flat.param_shard[start - flat.start : end - flat.start]
        parts = [
            (s.shard_start, Part.of(own, f"param.{s.name}", s.param_start, s.numel, s.param_numel))
            for s in flat.layout.slices(start, end)
        ]
        if parts:
            found.append(Block(own, parts, streamed=True))
    replicated = replicated_tensors(state, with_frozen) if rank == 0 else {}
    for name, tensor in {**replicated, **own_buffers(state, owners)}.items():
        whole = tensor.detach().reshape(-1)
        part = Part.of(whole, name, 0, whole.numel(), whole.numel())
        found.append(Block(whole, [(0, part)], streamed=name.startswith("param."), replicated=rank == 0))
    return found


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a 1-D tensor, in host memory."""
    return memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def pieces_of(state: TrainState) -> dict[str, Piece]:
    """The slices of master weights, optimizer states and sharded frozen parameters that this rank reads, by key."""
    pieces: dict[str, Piece] = {}
    for flat, optimizer in zip(state.flats, state.shard_optimizers, strict=True):
        states = list(optimizer.states())
        for part in flat.layout.slices(flat.start, flat.end):
            at = part.shard_start  # relative to the group's state shard
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


def replicated_tensors(state: TrainState, with_frozen: bool = True) -> dict[str, torch.Tensor]:
    """Tensors that every rank holds in full and rank 0 writes, by key: persistent buffers and unsharded frozen
    parameters. Keys of frozen and trained parameters look alike, so a later run may freeze or unfreeze one."""
    buffers = {buffer_key(name): buffer for name, buffer in buffers_of(state).items()}
    return buffers | {f"param.{name}": parameter.data for name, parameter in state.frozen if with_frozen}


def shapes_of(state: TrainState) -> dict[str, list[int]]:
    """The shape of every parameter, by name."""
    in_units = {
        slot.name: list(slot.shape) for flat in (*state.flats, *state.frozen_flats) for slot in flat.layout.slots
    }
    return dict(sorted({**in_units, **{name: list(p.shape) for name, p in state.frozen}}.items()))


def frozen_names(state: TrainState) -> list[str]:
    """Names of the parameters that are not trained."""
    in_units = [slot.name for flat in state.frozen_flats for slot in flat.layout.slots]
    return [*(name for name, _ in state.frozen), *in_units]


def tied_names(state: TrainState) -> dict[str, str]:
    """Other names of parameters that several modules share -> the name that the checkpoint uses."""
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
    """The dtype in which each parameter computes, by name."""
    in_units = {slot.name: flat.dtype for flat in (*state.flats, *state.frozen_flats) for slot in flat.layout.slots}
    return in_units | {name: parameter.dtype for name, parameter in state.frozen}
