"""Shard arithmetic: which element of which parameter lies where in a flat buffer, and who owns it. Pure integers,
torch-free.

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
"""Elements: every shard starts on a cache line in 8, 16 and 32 bit, which the SIMD kernels and the collectives like."""

STATE_BYTES = 12
"""Of each element: master and two moments in fp32."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat buffer: elements [offset, offset + numel)."""

    name: str
    shape: tuple[int, ...]
    group: int  # index of its optimizer parameter group
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Segment:
    """A run of one parameter group, relative to the start of the shard it lies in."""

    group: int
    start: int
    end: int


@dataclass(frozen=True)
class Slice:
    """Elements [param_start, param_start + numel) of a parameter, lying at shard_start of a rank's shard."""

    name: str
    param_numel: int
    param_start: int
    shard_start: int
    numel: int


@dataclass(frozen=True)
class Layout:
    slots: tuple[Slot, ...]
    world_size: int

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, Sequence[int], int]], world_size: int) -> Layout:
        """`parameters`: (name, shape, optimizer group) each; the caller has ordered them by group."""
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
        return padded(self.used, self.world_size)

    @cached_property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def shard(self, rank: int) -> tuple[int, int]:
        """[start, end) of `rank`'s shard, in elements of the flat buffer."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} of a world of {self.world_size}")
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def segments(self, start: int, end: int) -> list[Segment]:
        """The groups' runs inside elements [start, end), relative to start. Padding belongs to no group and is left
        out."""
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
        """The parts of parameters inside elements [start, end), relative to start; parameters without a part are left
        out."""
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


def kept_on_device(sizes: Sequence[int], ratio: float) -> list[bool]:
    """Which shards' states stay on the device when only `ratio` (0 to 1) of all elements is offloaded: the first ones,
    which the next forward needs first, as many as come nearest to the rest."""
    stays: list[bool] = []
    wanted, kept = (1 - ratio) * sum(sizes), 0
    for size in sizes:
        nearer = abs(kept + size - wanted) < abs(kept - wanted) or size == 0
        stay = nearer and all(stays)
        stays.append(stay)
        kept += size * stay
    return stays


def leaving_for_room(sizes: Sequence[int], stays: Sequence[bool], room_bytes: int) -> list[bool]:
    """Which shards' states go to the host when those that needn't stay may, as far as `room_bytes` hold the states of
    all shards up to theirs."""
    leaves = []
    for size, stay in zip(sizes, stays, strict=True):
        room_bytes -= STATE_BYTES * size
        leaves.append(not stay and room_bytes < 0)
    return leaves
