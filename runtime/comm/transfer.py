"""Copies between a GPU and its host on streams of their own, so that they overlap with computation.

down   device -> host        up   host -> device

Each copy begins after a mark that the caller has set in the compute stream.

Host tensors must be pinned (page-locked), or the copies are slow and do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Copy(Protocol):
    """A copy under way."""

    def wait_host(self) -> None:
        """Block the calling thread until the copy is complete."""

    def wait_device(self) -> None:
        """Make the current stream wait for the copy."""


class Transfers(Protocol):
    """Makes copies between one device and the host. Any thread may call; copies in one direction run in the order in
    which they were issued."""

    def mark(self) -> Any:
        """Record the current position of the current stream, for `after`."""

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        """Copy `source` (numel,) on the device to `target` (numel,) on the host, not before the mark `after`. Neither
        may be used until the copy is complete."""

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        """Copy `source` (numel,) on the host to `target` (numel,) on the device, as `down` does."""

    def settle(self) -> None:
        """Wait until the device neither reads nor writes host memory any more."""


class Copies:
    """Several copies as one Copy."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)

    def wait_host(self) -> None:
        """Block the calling thread until all copies are complete."""
        for copy in self._copies:
            copy.wait_host()

    def wait_device(self) -> None:
        """Make the current stream wait for all copies."""
        for copy in self._copies:
            copy.wait_device()


class HeldCopy:
    """A copy that keeps its source until somebody has waited for it."""

    def __init__(self, copy: Copy, source: torch.Tensor) -> None:
        self._copy, self._source = copy, [source]

    def wait_host(self) -> None:
        """Block the calling thread until the copy is complete."""
        self._copy.wait_host()
        self._source.clear()

    def wait_device(self) -> None:
        """Make the current stream wait for the copy."""
        self._copy.wait_device()
        self._source.clear()


class CudaCopy:
    """A copy that is complete when a CUDA event is."""

    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def wait_host(self) -> None:
        """Block the calling thread until the copy is complete."""
        self._event.synchronize()

    def wait_device(self) -> None:
        """Make the current stream wait for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaTransfers:
    """Copies on one stream per direction, because a GPU has a copy engine for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down_stream, self.up_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """See Transfers."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> CudaCopy:
        """See Transfers."""
        return self._copy(self.down_stream, after, source, target)

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> CudaCopy:
        """See Transfers."""
        return self._copy(self.up_stream, after, source, target)

    def settle(self) -> None:
        """See Transfers."""
        torch.cuda.synchronize(self.device)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        after: torch.cuda.Event,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> CudaCopy:
        stream.wait_event(after)
        # No record_stream: device memory is freed only after waiting for the copy, and the allocator would keep every
        # block until it had polled that itself.
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # waiting threads sleep
        done.record(stream)
        return CudaCopy(self.device, done)
