"""Shard arithmetic: where each parameter is in a flat buffer, and which rank has which elements. Torch-free.

flat buffer   | p0 ......... | p1 ... | p2 .................... | padding |      numel = multiple of world x ALIGNMENT
shards        |<----- rank 0 ----->|<----- rank 1 ----->|<----- rank 2 ----->|     all equal
segments      maximal runs of one optimizer parameter group inside a shard
slices        the part of each parameter that lies inside a shard
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGNMENT = 64
"""Elements to which shards are aligned, so that they start on a cache line in 8, 16 and 32 bit."""

STATE_BYTES = 12
"""Bytes of states per element: master and two moments in fp32."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat buffer: elements [offset, offset + numel)."""

    name: str
    shape: tuple[int, ...]
    group: int  # index of its optimizer parameter group
    offset: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Element of the flat buffer after the parameter."""
        return self.offset + self.numel


@dataclass(frozen=True)
class Segment:
    """Elements [start, end) of a shard that belong to one optimizer parameter group."""

    group: int
    start: int
    end: int


@dataclass(frozen=True)
class Slice:
    """Elements [param_start, param_start + numel) of a parameter, which are at shard_start of a rank's shard."""

    name: str
    param_numel: int
    param_start: int
    shard_start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """The layout of one flat buffer: its parameters and its equal shards."""

    slots: tuple[Slot, ...]
    world_size: int

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, Sequence[int], int]], world_size: int) -> Layout:
        """Lay out `parameters`: (name, shape, index of the optimizer parameter group), in order of the groups."""
        slots, offset = [], 0
        for name, shape, group in parameters:
            slots.append(Slot(name, tuple(shape), group, offset))
            offset += slots[-1].numel
        return cls(tuple(slots), world_size)

    @cached_property
    def used(self) -> int:
        """Elements that are parameters; the rest of `numel` is padding."""
        return self.slots[-1].end if self.slots else 0

    @cached_property
    def numel(self) -> int:
        """Elements of the flat buffer, padding included."""
        return padded(self.used, self.world_size)

    @cached_property
    def shard_numel(self) -> int:
        """Elements of each rank's shard."""
        return self.numel // self.world_size

    def shard(self, rank: int) -> tuple[int, int]:
        """[start, end) of `rank`'s shard, in elements of the flat buffer."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of a world of {self.world_size}")
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def segments(self, start: int, end: int) -> list[Segment]:
        """The segments of elements [start, end), relative to start. Padding belongs to no group and is left out."""
        runs: list[Segment] = []
        for slot in self.slots:
            low, high = max(slot.offset, start), min(slot.end, end)
            if low >= high:
                continue
            if runs and runs[-1].group == slot.group and runs[-1].end == low - start:
                runs[-1] = Segment(slot.group, runs[-1].start, high - start)
            else:
                runs.append(Segment(slot.group, low - start, high - start))
        return runs

    def slices(self, start: int, end: int) -> list[Slice]:
        """The slices of parameters in elements [start, end), relative to start."""
        parts = []
        for slot in self.slots:
            low, high = max(slot.offset, start), min(slot.end, end)
            if low < high:
                parts.append(Slice(slot.name, slot.numel, low - slot.offset, low - start, high - low))
        return parts


def padded(numel: int, world_size: int) -> int:
    """`numel` rounded up so that every rank's shard is a whole number of ALIGNMENT elements."""
    step = world_size * ALIGNMENT
    return -(-numel // step) * step


def keep_mask(sizes: Sequence[int], ratio: float) -> list[bool]:
    """For each shard of `sizes` elements, whether its states stay on the device when `ratio` (0 to 1) of all elements
    is offloaded: the first ones, which the next forward needs first, as near to the ratio as whole shards come."""
    keep: list[bool] = []
    wanted, kept = (1 - ratio) * sum(sizes), 0
    for size in sizes:
        nearer = abs(kept + size - wanted) < abs(kept - wanted) or size == 0
        stay = nearer and all(keep)
        keep.append(stay)
        kept += size * stay
    return keep


def offload_mask(sizes: Sequence[int], keep: Sequence[bool], room_bytes: int) -> list[bool]:
    """For each shard of `sizes` elements, whether its states are offloaded: those not in `keep` that don't fit, with
    the states of all shards before them, in `room_bytes` of device memory."""
    leaves = []
    for size, stay in zip(sizes, keep, strict=True):
        room_bytes -= STATE_BYTES * size
        leaves.append(not stay and room_bytes < 0)
    return leaves
