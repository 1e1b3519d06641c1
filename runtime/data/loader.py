"""The loader that `initialize(training_data=...)` returns. It knows which batches were trained, and a run that goes on
from a checkpoint goes on behind them. A script does nothing for it.

[Note: the data position]
An epoch is one order of all samples, the same on every rank: torch's DistributedSampler's for this seed and epoch. Rank
r takes samples k * world + r of it, so what all ranks have taken together is always the beginning of that order, and a
number of samples says where it ends, at any world size and micro-batch. (An incomplete last batch is the exception:
ranks fill up an epoch that does not divide by their number with its first samples, as DistributedSampler does.)

What counts is training: the position moves behind a batch when the engine takes its micro-step, `engine.step()`. A
batch that was fetched ahead or handed out without being trained comes again after a resume; one that a script skipped
before it trained a later one does not.

    for epoch in range(...):      each `for batch in loader` goes on behind the last batch that was trained, to the end
        for batch in loader:      of the epoch; the next one is a whole epoch in an order of its own. After a resume the
            ...                   first one is the rest of the epoch under way (after a `break`, too). len(loader) stays
                                  that of a whole epoch; `loader.epoch` is the epoch under way, counted from 0.

Who calls `loader.sampler.set_epoch(epoch)`, may: an epoch other than the one under way begins at its beginning. The
first call after a resume names the epoch under way, whatever its number, and later ones count from there: a script that
begins at 0 again gets the data that it would have got without the break.
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
    epoch: int = 0
    consumed: int = 0
    """Samples of the epoch's order that all ranks took together."""


class _Iteration:
    """One `for batch in loader`; it lives as long as that does."""


class ResumableSampler(Sampler[int]):
    """One rank's samples, from the position on to the end of the epoch. See [Note: the data position]."""

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
        """samples: in the data set, at least one. micro_steps: how many the engine has taken."""
        self.samples, self.rank, self.world_size, self.micro_batch = samples, rank, world_size, micro_batch
        self.seed, self.drop_last, self._micro_steps = seed, drop_last, micro_steps
        self.version = 0
        """Changes when the position comes from a checkpoint."""
        self._position = Position()
        self._seen = micro_steps()
        self._handed: tuple[Position, weakref.ref[_Iteration]] | None = None
        """Behind the last batch that was handed out, while it is not known to be trained; and to whom."""
        self._trained_by: weakref.ref[_Iteration] | None = None
        self._shift = 0  # from a script's epochs to ours
        self._restored = False

    # ---- the order -------------------------------------------------------------------------------------------------
    def order(self, epoch: int) -> Tensor:
        """(samples,) int64: the epoch's order of all samples."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.samples, generator=generator)

    def __iter__(self) -> Iterator[int]:
        at = self.position
        count = self.left(at)
        places = at.consumed + self.rank + self.world_size * torch.arange(count)
        yield from self.order(at.epoch)[places % self.samples].tolist()

    def __len__(self) -> int:
        """Of a whole epoch."""
        return self.left(Position())

    def left(self, at: Position) -> int:
        """Samples that every rank still takes in the epoch of `at`."""
        return max(0, -(-(self.samples - at.consumed) // self.world_size))

    def behind_batch(self, at: Position) -> Position:
        """The position when every rank has taken one batch more."""
        return Position(at.epoch, at.consumed + min(self.micro_batch, self.left(at)) * self.world_size)

    # ---- the position ----------------------------------------------------------------------------------------------
    @property
    def position(self) -> Position:
        """Where training goes on. The end of an epoch is the beginning of the next."""
        self._settle()
        at = self._position
        enough = self.micro_batch if self.drop_last else 1
        return Position(at.epoch + 1) if at.consumed and self.left(at) < enough else at

    @property
    def epoch(self) -> int:
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is of this epoch: see [Note: the data position]."""
        current = self.position
        if self._restored:
            self._restored, self._shift = False, current.epoch - epoch
        if epoch + self._shift != current.epoch:
            self._move(Position(epoch + self._shift))

    def hand_out(self, behind: Position, iteration: _Iteration) -> None:
        """A batch leaves, `behind` which the iteration will be."""
        self._settle()
        self._handed = behind, weakref.ref(iteration)

    def reach_end(self, start: Position, iteration: _Iteration) -> None:
        """An iteration that began at `start` has no more batches, which ends its epoch; unless nothing of the epoch was
        trained, or only by another iteration that is still under way (an evaluation inside a training loop)."""
        current = self.position
        other = self._trained_by() if self._trained_by is not None else None
        if current.epoch == start.epoch and current.consumed and (other is None or other is iteration):
            self._move(Position(start.epoch + 1))

    def _settle(self) -> None:
        """What was handed out before the engine's last micro-step is trained."""
        if (steps := self._micro_steps()) == self._seen:
            return
        self._seen = steps
        if self._handed is not None:
            self._position, self._trained_by = self._handed
            self._handed = None

    def _move(self, to: Position) -> None:
        self._position, self._handed, self._trained_by, self._seen = to, None, None, self._micro_steps()

    def state_dict(self) -> dict[str, int]:
        at = self.position
        return {"epoch": at.epoch, "consumed": at.consumed, "samples": self.samples, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Data of another size, or another seed, has another order: it begins at its beginning, with a warning."""
        to = Position(state["epoch"], state["consumed"])
        for what, now in (("samples", self.samples), ("seed", self.seed)):
            if state[what] != now:
                to = Position()
                if self.rank == 0:
                    log.warning(
                        f"training_data: the checkpoint was made with {what} {state[what]}, now it is {now}: the data "
                        "begins at its beginning"
                    )
                break
        self._move(to)
        self.version += 1
        self._restored, self._shift = True, 0


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a ResumableSampler. Other arguments are DataLoader's."""

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
        """The epoch under way, from 0."""
        return self.sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begins when the first batch is asked for; a checkpoint that is loaded later moves it, too."""
        iteration, sampler, version = _Iteration(), self.sampler, None
        while version != sampler.version:
            version, start = sampler.version, sampler.position
            self.generator.manual_seed(hash((sampler.seed, sampler.rank, start.epoch, start.consumed)) & (2**63 - 1))
            behind = start
            for batch in super().__iter__():
                behind = sampler.behind_batch(behind)
                sampler.hand_out(behind, iteration)
                yield batch
                if version != sampler.version:
                    break
            else:
                sampler.reach_end(start, iteration)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)
