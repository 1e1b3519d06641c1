"""How the gradients of one flat parameter group are accumulated and reduced.

[Note: life of a gradient]
A backward leaves each parameter's gradient in `param.grad`; a hook moves it into the flat gradient buffer and sets
`.grad` to None, so no gradient exists twice for longer than one hook.
- Full gradients (stages 0 and 1, no_sync, zerotop.accumulate "local"): the flat buffer is the accumulator. It is
  reduced in place, once, in the last micro-step's backward, and the optimizer reads it there.
- Sharded gradients (stages 2 and 3): the flat buffer is borrowed from a pool for one backward of the unit and
  reduced, then this rank's shard is added to the accumulator and the buffer given back. At any time two units have
  one, and the root unit. Its dtype is that of autograd's gradients, since a wider one would hold no more digits. If
  the accumulator is in host memory, the shard is copied there first (offload/download.py).
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
    """Copies reduced gradients to accumulators in host memory (offload/download.py)."""

    def send(
        self, source: torch.Tensor, target: torch.Tensor, add: bool, last: bool
    ) -> tuple[Copy, Future[float | None]]:
        """Copy `source` to `target`, or add it there. last: whether it is the optimizer step's last contribution; the
        future then holds the sum of squares of `target`, else None."""


class GradientState(enum.Enum):
    """How far a flat parameter group's gradients are within one backward."""

    WAITING = "no gradient of this backward has arrived; an accumulator may hold those of earlier micro-steps"
    FILLING = "some gradients have arrived in the full buffer"
    REDUCING = "the reduction is under way; the full buffer belongs to the communication backend"


@dataclass(frozen=True)
class GradientConfig:
    """The config's settings of gradients."""

    accumulate: torch.dtype
    """Dtype of accumulators."""
    communicate: torch.dtype | None = None
    """Dtype in which gradients are reduced; None: that of their buffer."""
    scale: float = 1.0
    """Factor on each gradient before it is reduced: 1 / gradient_predivide_factor, or 1 / world size with
    prescale_gradients."""


class Gradients:
    """This rank's gradients of one flat parameter group. [start, end) are the elements of its state shard."""

    def __init__(
        self,
        layout: Layout,
        policy: StagePolicy,
        dtype: torch.dtype,
        config: GradientConfig,
        pool: BufferPool,
        placement: StatePlacement,
        always_open: bool = False,
        grad_offload: GradSink | None = None,
        name: str = "",
    ) -> None:
        """placement: memory of the accumulated shard. always_open: gradients may arrive at any time in a backward.
        grad_offload: copies gradients to a placement in host memory. name: of the group, as profilers show it."""
        self.name, self._always_open = name, always_open
        self._placement, self._grad_offload = placement, grad_offload if policy.shards_gradients else None
        self.layout, self.policy, self.dtype, self.config, self.pool = layout, policy, dtype, config, pool
        self.comm: Comm = pool.comm
        self.ledger: Ledger = pool.ledger
        self.start, self.end = policy.state_shard(layout, self.comm.rank)
        self.state = GradientState.WAITING
        self._accumulated: torch.Tensor | None = None
        """(layout.numel,) full gradients, accumulated over several backwards."""
        self._borrowed: torch.Tensor | None = None
        """(>= layout.numel,) full gradients of one backward, from the pool."""
        self._shard: torch.Tensor | None = None
        """(state shard,) reduced gradients since the last boundary; only if the stage shards gradients."""
        self._shard_filled = False
        self._sum_of_squares: Future[float | None] | None = None
        self._is_boundary = True
        if self._grad_offload is not None:
            self._shard = self._accumulator()  # page-locking takes its time: before the first step, not in it
        self._filled = [False] * len(layout.slots)
        self._arrived = [False] * len(layout.slots)
        self._not_arrived = len(layout.slots)
        self._reducing = False  # this backward
        self._pending: Pending | None = None
        self._factor = 1.0
        self._summed = False
        """Whether the full gradients are reduced: this rank's shard of them is then the sum over ranks."""
        self._sent: torch.Tensor | None = None  # the copy that _pending reduces, if it reduces one
        self._last_use: Pending | None = None  # of _accumulated

    def _accumulator(self) -> torch.Tensor:
        return self._placement.zeros("gradients", self.end - self.start, self.config.accumulate)

    def begin_backward(self, reduce: bool, last: bool = True, factor: float = 1.0) -> None:
        """reduce: whether this backward's gradients are reduced over ranks. last: whether it is the boundary's.
        factor: multiplies each gradient."""
        self._is_boundary = last
        self._factor = factor * self.config.scale
        self._reducing = reduce
        self._begin()

    def _begin(self) -> None:
        self._arrived = [False] * len(self.layout.slots)
        self._not_arrived = len(self.layout.slots)
        if self._summed:
            self._keep_own_shard()

    def _keep_own_shard(self) -> None:
        """Zero all but this rank's shard of full gradients that are reduced already, because more gradients come: the
        next reduction then adds up the shards and what has arrived since."""
        self._summed = False
        low, high = self.layout.shard(self.comm.rank)
        full = self._full_to_fill()
        full[:low].zero_()
        full[high:].zero_()
        self._filled = [True] * len(self.layout.slots)

    def reopen(self) -> None:
        """Accept gradients again in a backward in which they were reduced already."""
        self.finish_reduce()
        self._begin()

    def receive(self, index: int, parameter: nn.Parameter) -> bool:
        """Move `parameter.grad` into the flat buffer at slot `index`. Returns whether all gradients of this backward
        have arrived."""
        grad = parameter.grad
        parameter.grad = None
        if grad is None:
            return False
        if grad.is_sparse:
            grad = grad.to_dense()
        slot = self.layout.slots[index]
        if grad.shape != slot.shape:
            raise RuntimeError(
                f"parameter {slot.name} {[*slot.shape]} was changed to shape {[*grad.shape]} after initialize(). "
                "Resize modules before initialize(), or call initialize() again on the changed model"
            )
        full = self._full_to_fill()
        target = full[slot.offset : slot.end]
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
            self._not_arrived -= 1
        return self._not_arrived == 0

    def was_reduced(self, index: int) -> bool:
        """Whether the gradient of slot `index` has arrived in this backward and its reduction has begun."""
        return self._arrived[index] and self.state is not GradientState.FILLING

    def keep_always_open(self) -> None:
        """From now on, expect gradients at any time in a backward."""
        self._always_open = True

    def _full_to_fill(self) -> torch.Tensor:
        """(layout.numel,) the full buffer, made or borrowed if there is none, when it may be written."""
        if self._accumulated is None and self._borrowed is None:
            numel = self.layout.numel
            if self.policy.shards_gradients and self._reducing:
                self._borrowed = self.pool.borrow(numel, self.config.communicate or self.dtype, self._always_open)
            else:
                self._accumulated = self.ledger.hold("gradients", self.comm.empty(numel, self.config.accumulate))
            self._full()[self.layout.used :].zero_()
        if self._last_use is not None:
            self._last_use.fence()
            self._last_use = None
        return self._full()

    def _full(self) -> torch.Tensor:
        if self._accumulated is not None:
            return self._accumulated
        assert self._borrowed is not None
        return self._borrowed[: self.layout.numel]

    def issue_reduce(self) -> None:
        """Start the reduction of the full buffer over ranks; parameters without a gradient count as zero."""
        full = self._full_to_fill()
        for slot, filled in zip(self.layout.slots, self._filled, strict=True):
            if not filled:
                full[slot.offset : slot.end].zero_()
        wanted = self.config.communicate or full.dtype
        if wanted != full.dtype:
            self._sent = self.pool.borrow(self.layout.numel, wanted)
            full = self._sent[: self.layout.numel].copy_(full)
        work = "reduce_scatter" if self.policy.shards_states else "all_reduce"
        with profiler_range(work, self.policy.stage, self.name):
            reduce = self.comm.reduce_scatter if self.policy.shards_states else self.comm.all_reduce
            self._pending = reduce(full)
        self.state = GradientState.REDUCING

    def finish_reduce(self) -> None:
        """Wait for the reduction and keep this rank's part of its result."""
        pending = self._pending
        if pending is None:
            return
        with profiler_range("reduce_wait", self.policy.stage, self.name):
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        self._pending = None
        self.state = GradientState.WAITING
        if self.policy.shards_gradients:
            pending = self._store_shard(pending)
            self._shard_filled = True
            self._filled = [False] * len(self.layout.slots)
            self._free_full(pending)
        elif self.policy.shards_states:
            pending.into(self._full()[self.start : self.end], add=False)
            self._last_use, self._summed = pending, True
        else:
            pending.wait()
            if self._sent is not None:
                self._full().copy_(self._sent[: self.layout.numel])
            self._last_use, self._summed = pending, True
        if self._sent is not None:
            self.pool.give_back(self._sent, pending)
            self._sent = None

    def _store_shard(self, pending: Pending) -> Pending:
        """Add the reduced shard to its accumulator. Returns the operation after which the full buffer is free."""
        if self._shard is None:
            self._shard = self._accumulator()
        if self._grad_offload is None:
            pending.into(self._shard, add=self._shard_filled)
            return pending
        pending.wait()
        full = self._full() if self._sent is None else self._sent[: self.layout.numel]
        reduced = self.comm.own_shard(full) if self.policy.shards_states else full
        with profiler_range("download", self.policy.stage, self.name):
            copy, self._sum_of_squares = self._grad_offload.send(
                reduced, self._shard, self._shard_filled, self._is_boundary
            )
        return _CopyingOut(pending, copy)

    def _free_full(self, pending: Pending) -> None:
        if self._borrowed is not None:
            self.pool.give_back(self._borrowed, pending)
            self._borrowed = None
        if self._accumulated is not None:  # after no_sync, at a stage that shards gradients
            pending.fence()
            self.ledger.release("gradients", self._accumulated)
            self.comm.release(self._accumulated)
            self._accumulated = None

    def buffers(self) -> list[torch.Tensor]:
        """The buffers that are held between two optimizer steps."""
        return [buffer for buffer in (self._accumulated, self._borrowed, self._shard) if buffer is not None]

    @property
    def touched(self) -> bool:
        """Whether any parameter received a gradient in this backward."""
        return any(self._arrived)

    def unreduced(self, slot: Slot) -> torch.Tensor:
        """(slot.numel,) one parameter's gradient as this rank has accumulated it, before the boundary reduces it."""
        return self._full()[slot.offset : slot.end]

    def forget_sum_of_squares(self) -> None:
        """Discard the cached sum of squares: the reduced gradient has been changed since."""
        self._sum_of_squares = None

    @property
    def sum_of_squares_job(self) -> Future[float | None] | None:
        """Computes the sum of squares of `reduced` with the download to host memory; None: nothing does."""
        return self._sum_of_squares

    def sum_of_squares(self) -> float | None:
        """The sum of squares of `reduced` if the download to host memory has computed it, else None."""
        return self._sum_of_squares.result() if self._sum_of_squares is not None else None

    @property
    def reduced(self) -> torch.Tensor:
        """(state shard,) gradients summed over ranks and micro-steps, from the boundary's reduction until `clear()`.
        The caller divides by the world size through its gradient scale."""
        if self.policy.shards_gradients:
            assert self._shard is not None
            return self._shard
        return self._full()[self.start : self.end]

    def clear(self) -> None:
        """Discard the gradients but keep their memory, which the next ones overwrite."""
        self._shard_filled = self._summed = False
        self._sum_of_squares = None
        self._filled = [False] * len(self.layout.slots)
        self.state = GradientState.WAITING


class _CopyingOut:
    """A finished reduction whose result is still being copied out of its buffer."""

    def __init__(self, reduction: Pending, copy: Copy) -> None:
        self._reduction, self._copy = reduction, copy

    def wait(self) -> None:
        return None

    def into(self, target: torch.Tensor, add: bool) -> None:
        raise AssertionError("the result of this reduction has been taken already")

    def fence(self) -> None:
        self._reduction.fence()
        self._copy.wait_device()
