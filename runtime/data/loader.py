"""The loader that `initialize(training_data=...)` returns: a resumed run continues after the last trained batch,
without any code in the script.

[Note: the data position]
An epoch is a permutation of all samples, the same on every rank: torch's DistributedSampler's for this seed and epoch.
Rank r takes samples k * world + r of it, so the samples that all ranks have taken together are always the beginning of
the permutation, and their number is a position that holds at any world size and micro-batch. (An exception is an
incomplete last batch: ranks fill up an epoch that does not divide by their number with its first samples, as
DistributedSampler does.)

Only trained batches count: the position moves past a batch when the engine takes its micro-step, `engine.step()`. A
batch that was prefetched or yielded without being trained is yielded again after a resume; one that a script skipped
before it trained a later one is not.

    for epoch in range(...):      each `for batch in loader` continues after the last trained batch, to the end of the
        for batch in loader:      epoch; the next one is a full epoch with another permutation. After a resume (or a
            ...                   `break`) the first one is the rest of the current epoch. len(loader) is always that of
                                  a full epoch; `loader.epoch` is the current epoch, counted from 0.

A script may call `loader.sampler.set_epoch(epoch)`: an epoch other than the current one starts at its beginning. The
first call after a resume names the current epoch, whatever its number, and later ones count from there: a script that
counts from 0 again gets the data that it would have got without the interruption.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

log = logging.getLogger("runtime.data")


@dataclass(frozen=True)
class Position:
    """A position in the training data. See [Note: the data position]."""

    epoch: int = 0
    consumed: int = 0
    """Samples of the epoch that all ranks have taken together."""


class _Iteration:
    """Identifies one `for batch in loader` by an object with the same lifetime."""


class ResumableSampler(Sampler[int]):
    """Yields one rank's sample indices, from the position to the end of the epoch. See [Note: the data position]."""

    def __init__(
        self,
        samples: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        seed: int = 0,
        drop_last: bool = False,
        micro_steps: Callable[[], int] = lambda: 0,
    ) -> None:
        """samples: size of the data set, at least 1. micro_steps: returns the engine's number of micro-steps."""
        self.samples, self.rank, self.world_size, self.micro_batch = samples, rank, world_size, micro_batch
        self.seed, self.drop_last, self._micro_steps = seed, drop_last, micro_steps
        self.version = 0
        """Incremented when the position is loaded from a checkpoint."""
        self._position = Position()
        self._seen = micro_steps()
        self._yielded: tuple[Position, weakref.ref[_Iteration]] | None = None
        """(position after the last yielded batch, its iteration), while that batch is not known to be trained."""
        self._trained_by: weakref.ref[_Iteration] | None = None
        self._shift = 0  # from a script's epochs to ours
        self._restored = False

    # ---- the order -------------------------------------------------------------------------------------------------
    def order(self, epoch: int) -> Tensor:
        """(samples,) int64: the permutation of all samples in this epoch."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.samples, generator=generator)

    def __iter__(self) -> Iterator[int]:
        at = self.position
        count = self.samples_left(at)
        places = at.consumed + self.rank + self.world_size * torch.arange(count)
        yield from self.order(at.epoch)[places % self.samples].tolist()

    def __len__(self) -> int:
        """Samples per rank in a full epoch."""
        return self.samples_left(Position())

    def samples_left(self, at: Position) -> int:
        """Samples that every rank still takes in the epoch, from position `at` on."""
        return max(0, -(-(self.samples - at.consumed) // self.world_size))

    def after_batch(self, at: Position) -> Position:
        """The position after every rank has taken one more batch."""
        return Position(at.epoch, at.consumed + min(self.micro_batch, self.samples_left(at)) * self.world_size)

    # ---- the position ----------------------------------------------------------------------------------------------
    @property
    def position(self) -> Position:
        """Where training continues. The end of an epoch counts as the beginning of the next."""
        self._count_trained()
        at = self._position
        enough = self.micro_batch if self.drop_last else 1
        return Position(at.epoch + 1) if at.consumed and self.samples_left(at) < enough else at

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration. See [Note: the data position]."""
        current = self.position
        if self._restored:
            self._restored, self._shift = False, current.epoch - epoch
        if epoch + self._shift != current.epoch:
            self._move(Position(epoch + self._shift))

    def mark_yielded(self, position_after: Position, iteration: _Iteration) -> None:
        """Record that `iteration` yields a batch; once it is trained, the position is `position_after`."""
        self._count_trained()
        self._yielded = position_after, weakref.ref(iteration)

    def end_iteration(self, start: Position, iteration: _Iteration) -> None:
        """An iteration that began at `start` has no more batches, which ends its epoch; unless nothing of the epoch was
        trained, or only by another iteration that is still under way (an evaluation inside a training loop)."""
        current = self.position
        other = self._trained_by() if self._trained_by is not None else None
        if current.epoch == start.epoch and current.consumed and (other is None or other is iteration):
            self._move(Position(start.epoch + 1))

    def _count_trained(self) -> None:
        """If the engine has taken a micro-step since the last call, count the batch yielded before it as trained."""
        if (steps := self._micro_steps()) == self._seen:
            return
        self._seen = steps
        if self._yielded is not None:
            self._position, self._trained_by = self._yielded
            self._yielded = None

    def _move(self, to: Position) -> None:
        self._position, self._yielded, self._trained_by, self._seen = to, None, None, self._micro_steps()

    def state_dict(self) -> dict[str, int]:
        """The position, and the size and seed of the data that it belongs to."""
        at = self.position
        return {"epoch": at.epoch, "consumed": at.consumed, "samples": self.samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position. With another data set size or seed it starts from the beginning, with a warning."""
        to = Position(state["epoch"], state["consumed"])
        for what, now in (("samples", self.samples), ("seed", self.seed)):
            if state[what] != now:
                to = Position()
                if self.rank == 0:
                    log.warning(
                        f"training_data: the checkpoint was made with {what} {state[what]}, now it is {now}: the data "
                        "starts from the beginning"
                    )
                break
        self._move(to)
        self.version += 1
        self._restored, self._shift = True, 0


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a ResumableSampler; `options` are DataLoader's."""

    sampler: ResumableSampler

    def __init__(self, data: Dataset[Any], sampler: ResumableSampler, **options: Any) -> None:
        # A generator of its own: DataLoader draws a number at the start of each iteration, and one that a resume begins
        # anew must not take it from the random numbers that training continues with.
        super().__init__(
            data,
            batch_size=sampler.micro_batch,
            sampler=sampler,
            drop_last=sampler.drop_last,
            generator=torch.Generator(),
            **options,
        )

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Starts at the position when the first batch is requested, and again when a checkpoint is loaded later."""
        iteration, sampler, version = _Iteration(), self.sampler, None
        while version != sampler.version:
            version, start = sampler.version, sampler.position
            self.generator.manual_seed(hash((sampler.seed, sampler.rank, start.epoch, start.consumed)) & (2**63 - 1))
            position_after = start
            for batch in super().__iter__():
                position_after = sampler.after_batch(position_after)
                sampler.mark_yielded(position_after, iteration)
                yield batch
                if version != sampler.version:
                    break
            else:
                sampler.end_iteration(start, iteration)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sampler's state."""
        self.sampler.load_state_dict(state)
