"""The windows of text of every rank and step, as a pure function of seed and step: resuming needs only the step.

Sample j of the global batch of step s is number s * global_batch + j of an endless stream. The stream runs through all
windows once an epoch, each epoch in an order of its own. Within a step, sample j is sample `j % micro_batch` of rank
`(j // micro_batch) % world` in micro-step `j // (micro_batch * world)`. So the global batch of a step holds the same
samples however it is split over ranks and micro-steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.data import DataError
from runtime.data.tokens import TokenDataset

_MASK = (1 << 64) - 1
_ROUNDS = 4


def _mix(value: int) -> int:
    """The 64-bit finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def shuffled(position: int, count: int, key: int) -> int:
    """The place of `position` in the permutation of range(count) that `key` names.

    A Feistel network on the next even number of bits, walked until the result is below `count` (Black and Rogaway,
    CT-RSA 2002): no table, no state, the same on every machine and with every version of numpy and torch.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix(right + (turn << 40))) & mask)
        position = left << half | right
        if position < count:
            return position


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """The stream of windows: `windows` in the text, `global_batch` samples per optimizer step."""

    seed: int
    windows: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.windows < 1 or self.global_batch < 1:
            raise ValueError(f"windows ({self.windows}) and global_batch ({self.global_batch}) must be at least 1")

    def window(self, sample: int) -> int:
        """Window of a sample of the endless stream (sample = step * global_batch + j)."""
        epoch, place = divmod(sample, self.windows)
        return shuffled(place, self.windows, _mix(_mix(self.seed & _MASK) ^ epoch))

    def indices(self, step: int, micro: int, rank: int, *, micro_batch: int, world: int) -> list[int]:
        """Windows of one rank's micro-step `micro` (from 0) of optimizer step `step` (from 0); length `micro_batch`."""
        first = step * self.global_batch + (micro * world + rank) * micro_batch
        return [self.window(sample) for sample in range(first, first + micro_batch)]

    def epoch(self, step: int) -> float:
        """Passes over the text completed before `step`."""
        return step * self.global_batch / self.windows


class Batch(NamedTuple):
    """`tokens` and `targets`, int64 [micro_batch, seq_len]; targets are the tokens one place on."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on `device`."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking), self.targets.to(device, non_blocking=non_blocking)
        )

    def pin(self) -> Batch:
        """A copy in pinned memory, so that `to` is asynchronous."""
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory())


@dataclasses.dataclass(frozen=True, slots=True)
class Batches:
    """One rank's micro-batches of every step. `micro_batch * accumulation * world` must be the order's global batch."""

    dataset: TokenDataset
    order: Order
    micro_batch: int
    accumulation: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        product = self.micro_batch * self.accumulation * self.world
        if product != self.order.global_batch:
            raise DataError(
                f"train_batch_size ({self.order.global_batch}) != train_micro_batch_size_per_gpu "
                f"({self.micro_batch}) x gradient_accumulation_steps ({self.accumulation}) x ranks ({self.world})"
                f" = {product}"
            )
        if self.order.windows != len(self.dataset):
            raise ValueError(f"the order has {self.order.windows} windows, the dataset {len(self.dataset)}")

    def micro_batch_at(self, step: int, micro: int) -> Batch:
        """This rank's micro-step `micro` of optimizer step `step`, both from 0."""
        windows = self.order.indices(step, micro, self.rank, micro_batch=self.micro_batch, world=self.world)
        rows = torch.from_numpy(self.dataset.rows(np.asarray(windows, dtype=np.int64)))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The `accumulation` micro-batches of this rank in optimizer step `step` (from 0)."""
        for micro in range(self.accumulation):
            yield self.micro_batch_at(step, micro)
