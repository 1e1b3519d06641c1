"""Where the gradients of one flat buffer land, accumulate and are reduced.

[Note: life of a gradient]
A backward leaves each parameter's gradient in `param.grad`; a hook moves it into the flat gradient buffer at once and
drops it, so no gradient exists twice for longer than one hook.
- Whole gradients (stages 0 and 1, no_sync, zerotop.accumulate "local"): the flat buffer is the accumulator itself. It
  is reduced once, in the last micro-step's backward, in place; the optimizer reads it where it is.
- Own ranges only (stages 2 and 3): the flat buffer is borrowed from a pool for one backward of this unit, reduced, its
  own shard added to the accumulator, and given back. Two units' buffers exist at any time, and the root unit's. It has
  the precision in which autograd makes gradients: what a wider one could hold is not in them. Where the accumulator is
  in other memory than the device's, the range first travels there (grad_offload.py).
"""

from __future__ import annotations

import enum
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from runtime.comm import Comm, Pending
from runtime.comm.pending import accumulate
from runtime.comm.profiling import profiler_range
from runtime.comm.transfer import Copy
from runtime.host.ledger import Ledger
from runtime.plan.layout import Layout, Slot
from runtime.zero.pool import BufferPool
from runtime.zero.stage import StagePolicy
from runtime.zero.state_placement import StatePlacement


class GradSink(Protocol):
    """The way of reduced gradients to accumulators in other memory than the device's (offload/download.py)."""

    def send(
        self, source: torch.Tensor, target: torch.Tensor, add: bool, last: bool
    ) -> tuple[Copy, Future[float | None]]:
        """Bring `source` into `target`, or add it there. last: the step's last contribution; the future then has the
        sum of squares of all of `target`."""


class GradientState(enum.Enum):
    """Where a flat buffer's gradients are within one backward."""

    WAITING = "no gradient of this backward has arrived; an accumulator may hold those of earlier micro-steps"
    FILLING = "some have arrived in the whole buffer"
    REDUCING = "the reduction is under way; the whole buffer is the backend's"


@dataclass(frozen=True)
class GradientConfig:
    """What the config says about gradients."""

    accumulate: torch.dtype
    """Of accumulators."""
    communicate: torch.dtype | None = None
    """Of buffers that are reduced; None: as they are."""
    scale: float = 1.0
    """Factor on each gradient before it is reduced: 1 / gradient_predivide_factor, or 1 / world size under
    prescale_gradients."""


class Gradients:
    """One flat's gradients on this rank: [start, end) is the state shard."""

    def __init__(
        self,
        layout: Layout,
        policy: StagePolicy,
        dtype: torch.dtype,
        numbers: GradientConfig,
        pool: BufferPool,
        placement: StatePlacement,
        open_all_along: bool = False,
        grad_offload: GradSink | None = None,
        name: str = "",
    ) -> None:
        """placement: where accumulated shards live. open_all_along: gradients arrive through the whole backward, not
        one after the other. grad_offload: the way to other memory than the device's. name: what profilers show."""
        self.name, self._open_all_along = name, open_all_along
        self._placement, self._grad_offload = placement, grad_offload if policy.shards_gradients else None
        self.layout, self.policy, self.dtype, self.numbers, self.pool = layout, policy, dtype, numbers, pool
        self.comm: Comm = pool.comm
        self.ledger: Ledger = pool.ledger
        self.start, self.end = policy.state_shard(layout, self.comm.rank)
        self.state = GradientState.WAITING
        self._kept: torch.Tensor | None = None
        """(layout.numel,) whole gradients over several backwards."""
        self._borrowed: torch.Tensor | None = None
        """(>= layout.numel,) whole gradients of one backward."""
        self._own: torch.Tensor | None = None
        """(state shard,) reduced gradients since the boundary; stages 2, 3 only."""
        self._own_any = False
        self._squares: Future[float | None] | None = None
        self._last = True
        if self._grad_offload is not None:
            self._own = self._accumulator()  # page-locking takes its time: before the first step, not in it
        self._filled = [False] * len(layout.slots)
        self._arrived = [False] * len(layout.slots)
        self._missing = len(layout.slots)
        self._reducing = False  # this backward
        self._pending: Pending | None = None
        self._factor = 1.0
        self._summed = False
        """The whole gradients are reduced: this rank's shard of them is the sum over ranks."""
        self._sent: torch.Tensor | None = None  # what _pending reduces, where that is a copy
        self._last_use: Pending | None = None  # of _kept

    def _accumulator(self) -> torch.Tensor:
        return self._placement.zeros("gradients", self.end - self.start, self.numbers.accumulate)

    def begin_backward(self, reduce: bool, last: bool = True, factor: float = 1.0) -> None:
        """`reduce`: this backward's gradients go out to the other ranks. `last`: no more come before the boundary.
        `factor`: on each gradient."""
        self._last = last
        self._factor = factor * self.numbers.scale
        self._reducing = reduce
        self._begin()

    def _begin(self) -> None:
        self._arrived = [False] * len(self.layout.slots)
        self._missing = len(self.layout.slots)
        if self._summed:
            self._keep_own_part()

    def _keep_own_part(self) -> None:
        """More gradients come after a reduction of whole ones: each rank goes on from its shard of that sum, and the
        next reduction adds up the shards and what has come since."""
        self._summed = False
        low, high = self.layout.shard(self.comm.rank)
        whole = self._whole()
        whole[:low].zero_()
        whole[high:].zero_()
        self._filled = [True] * len(self.layout.slots)

    def reopen(self) -> None:
        """Gradients arrive again in a backward in which they were reduced."""
        self.finish_reduce()
        self._begin()

    def receive(self, index: int, parameter: nn.Parameter) -> bool:
        """Move one parameter's fresh gradient into the flat buffer. True when it was the last one missing in this
        backward."""
        grad = parameter.grad
        parameter.grad = None
        if grad is None:
            return False
        if grad.is_sparse:
            grad = grad.to_dense()
        slot = self.layout.slots[index]
        whole = self._whole()
        target = whole[slot.offset : slot.end]
        if self._factor != 1.0:
            grad.mul_(self._factor)
        if self._filled[index]:
            accumulate(target, grad)
        else:
            target.view(slot.shape).copy_(grad)
            self._filled[index] = True
        self.state = GradientState.FILLING
        if not self._arrived[index]:
            self._arrived[index] = True
            self._missing -= 1
        return self._missing == 0

    def was_reduced(self, index: int) -> bool:
        """Whether this parameter's gradient of this backward has arrived and left again."""
        return self._arrived[index] and self.state is not GradientState.FILLING

    def keep_open(self) -> None:
        """Gradients arrive through the whole backward."""
        self._open_all_along = True

    def _whole(self) -> torch.Tensor:
        """The buffer that takes this backward's gradients: see the note."""
        if self._kept is None and self._borrowed is None:
            numel = self.layout.numel
            if self.policy.shards_gradients and self._reducing:
                self._borrowed = self.pool.borrow(numel, self.numbers.communicate or self.dtype, self._open_all_along)
            else:
                self._kept = self.ledger.hold("gradients", self.comm.empty(numel, self.numbers.accumulate))
            self._used()[self.layout.used :].zero_()
        if self._last_use is not None:
            self._last_use.fence()
            self._last_use = None
        return self._used()

    def _used(self) -> torch.Tensor:
        if self._kept is not None:
            return self._kept
        assert self._borrowed is not None
        return self._borrowed[: self.layout.numel]

    def issue_reduce(self) -> None:
        """Start summing the buffer over ranks; parameters without a gradient count as zero."""
        whole = self._whole()
        for slot, filled in zip(self.layout.slots, self._filled, strict=True):
            if not filled:
                whole[slot.offset : slot.end].zero_()
        wanted = self.numbers.communicate or whole.dtype
        if wanted != whole.dtype:
            self._sent = self.pool.borrow(self.layout.numel, wanted)
            whole = self._sent[: self.layout.numel].copy_(whole)
        work = "reduce_scatter" if self.policy.shards_states else "all_reduce"
        with profiler_range(work, self.policy.stage, self.name):
            reduce = self.comm.reduce_scatter if self.policy.shards_states else self.comm.all_reduce
            self._pending = reduce(whole)
        self.state = GradientState.REDUCING

    def finish_reduce(self) -> None:
        """Wait for the reduction, and take what is ours of it."""
        pending = self._pending
        if pending is None:
            return
        with profiler_range("reduce_wait", self.policy.stage, self.name):
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        self._pending = None
        self.state = GradientState.WAITING
        if self.policy.shards_gradients:
            pending = self._take_own(pending)
            self._own_any = True
            self._filled = [False] * len(self.layout.slots)
            self._drop_whole(pending)
        elif self.policy.shards_states:
            pending.into(self._used()[self.start : self.end], add=False)
            self._last_use, self._summed = pending, True
        else:
            pending.wait()
            if self._sent is not None:
                self._used().copy_(self._sent[: self.layout.numel])
            self._last_use, self._summed = pending, True
        if self._sent is not None:
            self.pool.give_back(self._sent, pending)
            self._sent = None

    def _take_own(self, pending: Pending) -> Pending:
        """The reduced own shard goes to its accumulator. Returns whose end frees the whole buffer."""
        if self._own is None:
            self._own = self._accumulator()
        if self._grad_offload is None:
            pending.into(self._own, add=self._own_any)
            return pending
        pending.wait()
        whole = self._used() if self._sent is None else self._sent[: self.layout.numel]
        reduced = self.comm.own_shard(whole) if self.policy.shards_states else whole
        with profiler_range("download", self.policy.stage, self.name):
            copy, self._squares = self._grad_offload.send(reduced, self._own, self._own_any, self._last)
        return _Leaving(pending, copy)

    def _drop_whole(self, pending: Pending) -> None:
        if self._borrowed is not None:
            self.pool.give_back(self._borrowed, pending)
            self._borrowed = None
        if self._kept is not None:  # after no_sync, at a stage that keeps own shards
            pending.fence()
            self.ledger.release("gradients", self._kept)
            self.comm.release(self._kept)
            self._kept = None

    def buffers(self) -> list[torch.Tensor]:
        """What is held between two steps."""
        return [buffer for buffer in (self._kept, self._borrowed, self._own) if buffer is not None]

    @property
    def touched(self) -> bool:
        """Whether any parameter received a gradient in this backward."""
        return any(self._arrived)

    def unreduced(self, slot: Slot) -> torch.Tensor:
        """(slot.numel,) what this rank accumulated of one parameter, before a boundary has reduced it."""
        return self._used()[slot.offset : slot.end]

    def forget_squares(self) -> None:
        """The reduced gradient has been changed since its squares were taken."""
        self._squares = None

    def squares(self) -> float | None:
        """The sum of squares of `reduced`, where it was taken on arrival."""
        return self._squares.result() if self._squares is not None else None

    @property
    def reduced(self) -> torch.Tensor:
        """(state shard,) summed over ranks and micro-steps; the caller divides by the world size through its gradient
        scale. Valid between the boundary's reduction and `clear()`."""
        if self.policy.shards_gradients:
            assert self._own is not None
            return self._own
        return self._used()[self.start : self.end]

    def clear(self) -> None:
        """Forget the gradients. Memory is kept; the next arrival overwrites."""
        self._own_any = self._summed = False
        self._squares = None
        self._filled = [False] * len(self.layout.slots)
        self.state = GradientState.WAITING


class _Leaving:
    """A reduction whose result is still being copied from its buffer."""

    def __init__(self, reduction: Pending, copy: Copy) -> None:
        self._reduction, self._copy = reduction, copy

    def wait(self) -> None:
        return None

    def into(self, target: torch.Tensor, add: bool) -> None:
        raise AssertionError("its result has been taken")

    def fence(self) -> None:
        self._reduction.fence()
        self._copy.wait_device()
