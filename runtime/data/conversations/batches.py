"""The sequences of every rank and step as tensors: a pure function of seed and step, like the order of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.data import DataError
from runtime.data.conversations.packing import Plan
from runtime.data.conversations.store import Store
from runtime.data.order import Order

IGNORED = -100
"""Target of a position that the loss does not count."""
_ROUND_TO = 8


class Batch(NamedTuple):
    """A micro-batch, int64 [rows, length]. `Sequences.batch` says what is in it."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch on `device`."""
        return Batch(*(part.to(device, non_blocking=non_blocking) for part in self))

    def pin(self) -> Batch:
        """A copy in pinned memory, so that `to` is asynchronous."""
        return Batch(*(part.pin_memory() for part in self))


@dataclass(frozen=True)
class Sequences:
    """Packed or single samples. `width`: the fixed length of rows; None: each micro-batch is as long as its longest
    row. `padding`: the token that fills rows up."""

    store: Store
    plan: Plan
    padding: int
    width: int | None

    def __len__(self) -> int:
        return len(self.plan)

    def batch(self, numbers: list[int], rows: int | None = None) -> Batch:
        """Tensors of some sequences, and of padding up to `rows` of them; see `gather`."""
        return self.gather([(self, number) for number in numbers], rows)

    @staticmethod
    def gather(chosen: list[tuple[Sequences, int]], rows: int | None = None) -> Batch:
        """Tensors of some sequences, of one store or of several, and of padding up to `rows` of them.

        The target of a token is the next one of the same document, where that is trained. Positions restart at every
        document; padding is a document of its own at the end of a row.
        """
        count = rows or len(chosen)
        length = max((_row_length(sequences, number) for sequences, number in chosen), default=_ROUND_TO)
        tokens = np.empty((count, length), np.int64)
        targets = np.full((count, length), IGNORED, np.int64)
        positions = np.empty((count, length), np.int64)
        counting = np.arange(length)
        for row, (sequences, number) in enumerate(chosen):
            store, at = sequences.store, 0
            for sample in sequences.plan.of(number).tolist():
                first, last = int(store.offsets[sample]), int(store.offsets[sample + 1])
                end = at + last - first
                ids = store.tokens[first:last].astype(np.int64)
                tokens[row, at:end] = ids
                targets[row, at : end - 1] = np.where(store.trained[first + 1 : last], ids[1:], IGNORED)
                positions[row, at:end] = counting[: end - at]
                at = end
            tokens[row, at:] = sequences.padding
            positions[row, at:] = counting[: length - at]
        tokens[len(chosen) :] = chosen[0][0].padding if chosen else 0
        positions[len(chosen) :] = counting
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions))


def _row_length(sequences: Sequences, number: int) -> int:
    if sequences.width is not None:
        return sequences.width
    return -(-int(sequences.plan.lengths[number]) // _ROUND_TO) * _ROUND_TO


class TrainingBatches:
    """One rank's micro-batches of every step. `micro_batch * accumulation * world` is the global batch.

    The next step's micro-batches are made beside the current one, in pinned memory if `pin`.
    """

    def __init__(
        self,
        sequences: Sequences,
        seed: int,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        pin: bool = False,
    ) -> None:
        if len(sequences) == 0:
            raise DataError("zerotop.data: no sequence to train on")
        self.sequences = sequences
        self.order = Order(seed, len(sequences), micro_batch * accumulation * world)
        self.micro_batch, self.accumulation, self.rank, self.world = micro_batch, accumulation, rank, world
        self._ahead = Ahead(self._make, pin)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The `accumulation` micro-batches of this rank in optimizer step `step` (from 0)."""
        yield from self._ahead.take(step)

    def numbers(self, step: int, micro: int) -> list[int]:
        """The sequences of this rank's micro-step `micro` (from 0)."""
        return self.order.indices(step, micro, self.rank, micro_batch=self.micro_batch, world=self.world)

    def trained_tokens(self, step: int) -> int:
        """Targets that the loss counts in the whole global batch of a step, over all ranks and micro-steps."""
        first = step * self.order.global_batch
        numbers = [self.order.window(sample) for sample in range(first, first + self.order.global_batch)]
        return int(self.sequences.plan.counted[numbers].sum())

    def epoch(self, step: int) -> float:
        """Passes over the data completed before `step`."""
        return self.order.epoch(step)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the step says where the data is."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Accepts what `state_dict` returned."""

    def close(self) -> None:
        """End the thread that makes batches."""
        self._ahead.close()

    def _make(self, step: int) -> list[Batch]:
        return [self.sequences.batch(self.numbers(step, micro)) for micro in range(self.accumulation)]


class EvaluationBatches:
    """All sequences once, in turn to the ranks, as many forward passes on each: rows of padding fill them up."""

    def __init__(self, sequences: Sequences, micro_batch: int, rank: int, world: int, pin: bool = False) -> None:
        if len(sequences) == 0:
            raise DataError("zerotop.evaluation: no sequence to evaluate on")
        self.sequences = sequences
        self.micro_batch, self.rank, self.world = micro_batch, rank, world
        self.passes = -(-len(sequences) // (micro_batch * world))
        """Forward passes of each rank."""
        self.trained_tokens = int(sequences.plan.counted.sum())
        """Targets that the loss counts, over all ranks."""
        self.samples = len(sequences.plan.samples)
        self._pin = pin

    def __iter__(self) -> Iterator[Batch]:
        ahead = Ahead(lambda index: [self._make(index)], self._pin)
        try:
            for index in range(self.passes):
                yield from ahead.take(index, last=index + 1 == self.passes)
        finally:
            ahead.close()

    def _make(self, index: int) -> Batch:
        first = (index * self.world + self.rank) * self.micro_batch
        numbers = list(range(first, min(first + self.micro_batch, len(self.sequences))))
        return self.sequences.batch(numbers, rows=self.micro_batch)


class Ahead:
    """Makes the batches of the next index in a thread while those of the current one are used."""

    def __init__(self, make: Callable[[int], list[Batch]], pin: bool) -> None:
        self._make_batches, self._pin = make, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def take(self, index: int, last: bool = False) -> list[Batch]:
        """The batches of `index`; those of the next one are begun unless it is the `last`."""
        coming = self._next
        if coming is None or coming[0] != index:
            coming = (index, self._pool.submit(self._made, index))
        batches = coming[1].result()
        self._next = None if last else (index + 1, self._pool.submit(self._made, index + 1))
        return batches

    def _made(self, index: int) -> list[Batch]:
        batches = self._make_batches(index)
        return [batch.pin() for batch in batches] if self._pin else batches

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._next = None
