"""Downloads reduced gradients from the device to the accumulators in host memory.

backward  | unit 6 computes | unit 5 computes | unit 4 computes |
reduce    |                 | 6               | 5               |
copy      |                                   | 6 -> slot A     | 5 -> slot B            page-locked, two of them
thread                                                 | A added to 6's accumulator | B to 5's

So the training thread does not wait for copies, unless they are slower than backward; then it waits for a free slot.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime import native
from runtime.comm.pending import combine
from runtime.comm.transfer import Copy, Transfers


@dataclass
class _Slot:
    buffer: torch.Tensor  # (nbytes,) uint8 in pinned memory
    job: Future[float | None] | None = None


@dataclass
class GradOffload:
    """Downloads the gradients of all groups whose states are in other memory than their parameters."""

    transfers: Transfers
    executor: Executor
    """One thread that adds gradients to the accumulators."""
    threads: int
    """CPU threads of each addition."""
    buffers: list[torch.Tensor]
    """OFFLOAD_SLOTS pinned uint8 buffers, each as large as the largest shard of gradients."""
    _slots: list[_Slot] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._slots = [_Slot(buffer) for buffer in self.buffers]

    def send(
        self, source: torch.Tensor, target: torch.Tensor, add: bool, last: bool
    ) -> tuple[Copy, Future[float | None]]:
        """Copy `source` (numel,) on the device, after the current stream's work, to `target` (numel,) on the host, or
        add it there. last: whether it is the optimizer step's last contribution; the future then holds the sum of
        squares of `target`, else None.

        `source` may be overwritten when the copy is complete; `target` is complete when the future is.
        """
        slot = self._slots[self._sent % len(self._slots)]
        self._sent += 1
        if slot.job is not None:
            slot.job.result()
        staged = slot.buffer[: source.numel() * source.element_size()].view(source.dtype)
        copy = self.transfers.down(source, staged, self.transfers.mark())
        slot.job = self.executor.submit(self._accumulate, copy, staged, target, add, last)
        return copy, slot.job

    def _accumulate(
        self, copy: Copy, staged: torch.Tensor, target: torch.Tensor, add: bool, last: bool
    ) -> float | None:
        copy.wait_host()
        combine(target, staged, add, threads=self.threads)
        if not last or not native.available():
            return None
        return native.sum_of_squares(target, threads=self.threads)[0]

    def fetch(self, source: torch.Tensor, after: Any) -> torch.Tensor:
        """Copy `source` (numel,) on the device to host memory, which stays valid until the next call. For the thread of
        `executor`, between backwards."""
        slot = self._slots[0]
        staged = slot.buffer[: source.numel() * source.element_size()].view(source.dtype)
        self.transfers.down(source, staged, after).wait_host()
        return staged

    @property
    def jobs(self) -> list[Future[float | None]]:
        """The last downloads; all earlier ones are complete when these are."""
        return [slot.job for slot in self._slots if slot.job is not None]

    def drain(self) -> None:
        """Wait until all gradients that were sent are accumulated. Raises the exceptions of failed downloads."""
        for slot in self._slots:
            if slot.job is not None:
                slot.job.result()
                slot.job = None
