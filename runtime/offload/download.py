"""Reduced gradients on their way from a device to the accumulators in host memory.

backward  | unit 6 computes | unit 5 computes | unit 4 computes |
reduce    |                 | 6               | 5               |
copy      |                                   | 6 -> slot A     | 5 -> slot B            page-locked, two of them
thread                                                 | A added to 6's accumulator | B to 5's

So the training thread never waits for a copy, unless copies are slower than backward; then it waits for a slot.
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
    buffer: torch.Tensor  # (bytes,) uint8, host
    job: Future[float | None] | None = None


@dataclass
class GradOffload:
    """Shared by all flats whose states are in other memory than their parameters."""

    transfers: Transfers
    executor: Executor
    """One thread."""
    threads: int
    """For adding up."""
    buffers: list[torch.Tensor]
    """OFFLOAD_SLOTS page-locked byte buffers, each as large as the largest range that travels."""
    _slots: list[_Slot] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._slots = [_Slot(buffer) for buffer in self.buffers]

    def send(
        self, source: torch.Tensor, target: torch.Tensor, add: bool, last: bool
    ) -> tuple[Copy, Future[float | None]]:
        """Bring `source` (numel,) from the device, after the current stream's work, into `target` (numel,) on the host,
        or add it there. last: the step's last contribution; the future then has the sum of squares of all of `target`.

        `source` may be written again after the copy; `target` is complete when the future is done.
        """
        slot = self._slots[self._sent % len(self._slots)]
        self._sent += 1
        if slot.job is not None:
            slot.job.result()
        staged = slot.buffer[: source.numel() * source.element_size()].view(source.dtype)
        copy = self.transfers.down(source, staged, self.transfers.mark())
        slot.job = self.executor.submit(self._take, copy, staged, target, add, last)
        return copy, slot.job

    def _take(self, copy: Copy, staged: torch.Tensor, target: torch.Tensor, add: bool, last: bool) -> float | None:
        copy.wait_host()
        combine(target, staged, add, threads=self.threads)
        if not last or not native.available():
            return None
        return native.sum_of_squares(target, threads=self.threads)[0]

    def fetch(self, source: torch.Tensor, after: Any) -> torch.Tensor:
        """`source` (numel,) from the device, in host memory that is good until the next call. For the thread of
        `executor`, between backwards."""
        slot = self._slots[0]
        staged = slot.buffer[: source.numel() * source.element_size()].view(source.dtype)
        self.transfers.down(source, staged, after).wait_host()
        return staged

    def drain(self) -> None:
        """Returns when everything that was sent has arrived. Raises what went wrong on the way."""
        for slot in self._slots:
            if slot.job is not None:
                slot.job.result()
                slot.job = None
