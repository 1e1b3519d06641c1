"""A unit: parameters that are gathered, reduced and updated together, in one flat buffer per dtype.

[Note: life of a gradient]
A backward leaves each parameter's gradient in `param.grad`; a hook moves it into the flat gradient buffer at once and
drops it, so no gradient exists twice for longer than one hook.
- Policies that keep whole gradients (stages 0, 1): the flat buffer is the accumulator itself. It is reduced once, in
  the last micro-step's backward, in place; the optimizer reads it where it is.
- Policies that keep only their own range (stages 2, 3): the flat buffer is borrowed from a pool for one backward of
  this unit, reduced, its own range added to the accumulator, and given back. About two units' buffers exist at any
  time, and the root unit's.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import nn

from runtime import native
from runtime.comm import Comm, Done, Pending
from runtime.memory import Ledger
from runtime.zero.layout import Layout
from runtime.zero.stage import StagePolicy


class GradientState(enum.Enum):
    """Where a flat buffer's gradients are within one backward."""

    WAITING = "no gradient of this backward has arrived; an accumulator may hold those of earlier micro-steps"
    FILLING = "some have arrived in the whole buffer"
    REDUCING = "the reduction is under way; the whole buffer is the backend's"


class BufferPool:
    """Whole-unit gradient buffers, lent out for the time of one backward. A buffer is never given back to the
    allocator: faulting its pages in again would cost more than the reduction."""

    def __init__(self, dtype: torch.dtype, device: torch.device, ledger: Ledger) -> None:
        self.dtype, self.device, self.ledger = dtype, device, ledger
        self._free: list[torch.Tensor] = []

    def borrow(self, numel: int) -> torch.Tensor:
        """An uninitialised 1-D buffer of at least `numel` elements."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= numel]
        if fitting:
            smallest = min(fitting, key=torch.Tensor.numel)
            self._free = [buffer for buffer in self._free if buffer is not smallest]
            return smallest
        return self.ledger.hold("communication", torch.empty(numel, dtype=self.dtype, device=self.device))

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)


def _accumulate(target: torch.Tensor, grad: torch.Tensor) -> None:
    """target += grad, where torch is slow: a 16-bit gradient into an fp32 buffer on a CPU takes it five times as
    long."""
    mixed = target.dtype == torch.float32 and grad.dtype == torch.bfloat16
    if mixed and target.device.type == "cpu" and grad.is_contiguous() and native.available():
        native.accumulate(target, grad.view(-1), threads=torch.get_num_threads())
    else:
        target.view(grad.shape).add_(grad)


class Flat:
    """One flat buffer of a unit: trainable parameters of one dtype, ordered by optimizer parameter group.

    parameters  (layout.numel,) in the compute dtype; every `param.data` is a view into it
    masters     (state_numel,) fp32; for fp32 parameters a view into `parameters`, not a copy
    gradient    (state_numel,) in the accumulation dtype, valid between the boundary's reduction and `clear()`
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[str, nn.Parameter, int]],
        dtype: torch.dtype,
        policy: StagePolicy,
        comm: Comm,
        ledger: Ledger,
        pool: BufferPool,
        accumulate_dtype: torch.dtype,
    ) -> None:
        self.name, self.policy, self.comm, self.ledger, self.pool = name, policy, comm, ledger, pool
        self.members = [parameter for _, parameter, _ in parameters]
        self.layout = Layout.of([(n, p.shape, group) for n, p, group in parameters], comm.world_size)
        self.dtype, self.accumulate_dtype = dtype, accumulate_dtype
        self.start, self.end = policy.state_range(self.layout, comm.rank)
        self.segments = self.layout.segments(self.start, self.end)
        self._adopt(dtype)
        self.whole: torch.Tensor | None = None
        """(layout.numel,) gradients of this backward (stage 2, 3: borrowed) or since the boundary (stages 0, 1:
        kept)."""
        self.accumulated: torch.Tensor | None = None
        """(state_numel,) own range's gradients since the boundary; stages 2, 3 only."""
        self._borrowed: torch.Tensor | None = None
        self._filled = [False] * len(self.members)
        self._arrived = [False] * len(self.members)
        self._missing = len(self.members)
        self._accumulated_any = False
        self._pending: Pending | Done | None = None
        self.gradient_state = GradientState.WAITING

    @property
    def state_numel(self) -> int:
        return self.end - self.start

    # ---- parameters --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _adopt(self, dtype: torch.dtype) -> None:
        """Move the parameters' values (rank 0's) into the flat buffer, one unit at a time, so that peak memory is one
        unit above the model."""
        device = self.comm.device
        exact = torch.zeros(self.layout.numel, dtype=torch.float32, device=device)
        for slot, parameter in zip(self.layout.slots, self.members, strict=True):
            exact[slot.offset : slot.end].copy_(parameter.detach().reshape(-1))
        self.comm.broadcast(exact)
        if dtype == torch.float32:
            self.parameters = self.ledger.hold("parameters", exact)
            self.masters = self.parameters[self.start : self.end]
        else:
            self.parameters = self.ledger.hold("parameters", exact.to(dtype))
            self.masters = self.ledger.hold("masters", exact[self.start : self.end].clone())
        for slot, parameter in zip(self.layout.slots, self.members, strict=True):
            parameter.data = self.parameters[slot.offset : slot.end].view(slot.shape)
            parameter.grad = None

    @property
    def own_parameters(self) -> torch.Tensor:
        """(state_numel,) the compute-dtype parameters that this rank updates."""
        return self.parameters[self.start : self.end]

    def gather(self) -> Pending | Done:
        """After the update: fetch the ranges that other ranks updated."""
        return self.comm.all_gather(self.parameters) if self.policy.own_states else Done()

    def masters_to_parameters(self) -> None:
        """After the masters were written from outside (a checkpoint)."""
        if self.masters.data_ptr() != self.own_parameters.data_ptr():
            self.own_parameters.copy_(self.masters)

    # ---- gradients: see [Note: life of a gradient] -------------------------------------------------------------------
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
        if self._arrived[index] and self.gradient_state is not GradientState.FILLING:
            raise RuntimeError(
                f"{slot.name} received a second gradient in one backward, after its unit was reduced: a module "
                f"that is used several times "
                "under re-entrant activation checkpointing does this; call torch.utils.checkpoint with "
                "use_reentrant=False"
            )
        whole = self._whole_buffer()
        target = whole[slot.offset : slot.end]
        if self._filled[index]:
            _accumulate(target, grad)
        else:
            target.view(slot.shape).copy_(grad)
            self._filled[index] = True
        self.gradient_state = GradientState.FILLING
        if not self._arrived[index]:
            self._arrived[index] = True
            self._missing -= 1
        return self._missing == 0

    def _whole_buffer(self) -> torch.Tensor:
        if self.whole is None:
            if self.policy.own_gradients:
                self._borrowed = self.pool.borrow(self.layout.numel)
                self.whole = self._borrowed[: self.layout.numel]
            else:
                empty = torch.empty(self.layout.numel, dtype=self.accumulate_dtype, device=self.comm.device)
                self.whole = self.ledger.hold("gradients", empty)
            self.whole[self.layout.used :].zero_()
        return self.whole

    def issue_reduce(self) -> None:
        """Start summing this buffer over ranks; parameters without a gradient count as zero."""
        whole = self._whole_buffer()
        for slot, filled in zip(self.layout.slots, self._filled, strict=True):
            if not filled:
                whole[slot.offset : slot.end].zero_()
        self._pending = self.comm.reduce_scatter(whole) if self.policy.own_states else self.comm.all_reduce(whole)
        self.gradient_state = GradientState.REDUCING

    def finish_reduce(self) -> None:
        """Wait for the reduction, and take what is ours of it."""
        if self._pending is None:
            return
        self._pending.wait()
        self._pending = None
        self.gradient_state = GradientState.WAITING
        if not self.policy.own_gradients:
            return
        whole = self._whole_buffer()
        own = whole[self.start : self.end]
        if self.accumulated is None:
            empty = torch.empty(self.state_numel, dtype=self.accumulate_dtype, device=self.comm.device)
            self.accumulated = self.ledger.hold("gradients", empty)
        if self._accumulated_any:
            self.accumulated.add_(own)
        else:
            self.accumulated.copy_(own)
            self._accumulated_any = True
        assert self._borrowed is not None
        self.pool.give_back(self._borrowed)
        self.whole = self._borrowed = None
        self._filled = [False] * len(self.members)

    def begin_backward(self) -> None:
        self._arrived = [False] * len(self.members)
        self._missing = len(self.members)

    @property
    def gradient(self) -> torch.Tensor:
        """(state_numel,) summed over ranks and micro-steps; the caller divides by the world size through its gradient
        scale."""
        if self.policy.own_gradients:
            assert self.accumulated is not None
            return self.accumulated
        assert self.whole is not None
        return self.whole[self.start : self.end]

    def clear(self) -> None:
        """Forget the gradients. Memory is kept; the next arrival overwrites."""
        self._accumulated_any = False
        self._filled = [False] * len(self.members)
        self.gradient_state = GradientState.WAITING
