"""Tensors as a checkpoint holds them: each rank's slices of each parameter. (Without
torch.distributed.checkpoint, which takes 48 MB: a rank whose writer process writes never imports it.)"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from runtime.checkpoint.buffers import ALIKE, Owners, buffers_of, key_of, own_buffers
from runtime.models.names import plain_name

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.zero.flat import Flat


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
    flat: Flat | None = None
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


def blocks_of(engine: Engine, owners: Owners | None = ALIKE, with_frozen: bool = True) -> list[Block]:
    """What this rank writes, in the order of updates: masters ("param.NAME") and optimizer states
    ("state.STATE.NAME") of its own ranges, frozen parameters if wanted, on rank 0 what all ranks hold alike, and
    buffers of its own. owners: see checkpoint/buffers.py; None: all that this rank might write."""
    rank, found = engine.comm.rank, []
    for flat, rule in zip(engine.flats, engine.rules, strict=True):
        start, end = flat.layout.range(rank)
        low, high = start - flat.start, end - flat.start  # in the flat's state range
        slices = flat.layout.slices(start, end)
        held = [("param", flat.masters, 0), *((f"state.{s.name}", s.tensor, s.start) for s in rule.states())]
        for kind, tensor, first in held:
            at, until = max(low, first), min(high, first + tensor.numel())
            parts = [
                (part.range_start - (at - low), Part(f"{kind}.{part.name}", part.param_start, part.numel,
                                                     part.param_numel, tensor.dtype))
                for part in slices
                if low + part.range_start >= at and low + part.range_start + part.numel <= until
            ]  # fmt: skip
            if parts:
                found.append(Block(tensor[at - first : until - first], parts, flat, stays=flat.home.offloaded))
    for flat in engine.frozen_flats if with_frozen else ():
        start, end = flat.layout.range(rank)
        own = flat.own[start - flat.start : end - flat.start]
        parts = [
            (s.range_start, Part(f"param.{s.name}", s.param_start, s.numel, s.param_numel, own.dtype))
            for s in flat.layout.slices(start, end)
        ]
        if parts:
            found.append(Block(own, parts, stays=True))
    alike = whole_tensors(engine, with_frozen) if rank == 0 else {}
    for name, tensor in {**alike, **own_buffers(engine, owners)}.items():
        whole = tensor.detach().reshape(-1)
        part = Part(name, 0, whole.numel(), whole.numel(), whole.dtype)
        found.append(Block(whole, [(0, part)], stays=name.startswith("param."), alike=rank == 0))
    return found


def pieces_of(engine: Engine) -> dict[str, Piece]:
    """All that this rank holds of masters and optimizer states, for reading into."""
    pieces: dict[str, Piece] = {}
    for flat, rule in zip(engine.flats, engine.rules, strict=True):
        states = list(rule.states())
        for part in flat.layout.slices(flat.start, flat.end):
            at = part.range_start  # in the flat's state range
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


def whole_tensors(engine: Engine, with_frozen: bool = True) -> dict[str, torch.Tensor]:
    """What every rank has whole and rank 0 writes: persistent buffers and frozen parameters. A frozen parameter has the
    same name as a trained one, so that it may be the other in the next attempt."""
    buffers = {key_of(name): buffer for name, buffer in buffers_of(engine).items()}
    return buffers | {f"param.{name}": parameter.data for name, parameter in engine.frozen if with_frozen}


def shapes_of(engine: Engine) -> dict[str, list[int]]:
    """The shape of every parameter by name."""
    in_units = {
        slot.name: list(slot.shape) for flat in (*engine.flats, *engine.frozen_flats) for slot in flat.layout.slots
    }
    return dict(sorted({**in_units, **{name: list(p.shape) for name, p in engine.frozen}}.items()))


def frozen_names(engine: Engine) -> list[str]:
    """Parameters that are not trained."""
    in_units = [slot.name for flat in engine.frozen_flats for slot in flat.layout.slots]
    return [*(name for name, _ in engine.frozen), *in_units]


def tied_names(engine: Engine) -> dict[str, str]:
    """Further names of parameters that several modules share, and the one that each has in a checkpoint."""
    known = shapes_of(engine)
    names: dict[int, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return {
        name: first
        for several in names.values()
        for first in [next((name for name in several if name in known), None)]
        for name in several
        if first is not None and name != first
    }


def dtypes_of(engine: Engine) -> dict[str, torch.dtype]:
    """The dtype in which every parameter computes, by name."""
    in_units = {slot.name: flat.dtype for flat in (*engine.flats, *engine.frozen_flats) for slot in flat.layout.slots}
    return in_units | {name: parameter.dtype for name, parameter in engine.frozen}
