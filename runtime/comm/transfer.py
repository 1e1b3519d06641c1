"""Copies between a GPU and its host that run beside the computing, on streams of their own.

down   device -> host        up   host -> device

Each comes after a point of the computing stream that the caller marked: what was given to it before then is done.

Host tensors must be page-locked, or the copies are neither fast nor beside anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Copy(Protocol):
    """A copy under way."""

    def wait_host(self) -> None:
        """Blocks the calling thread until the copy is complete."""

    def wait_device(self) -> None:
        """Work that the current stream gets from now on comes after the copy."""


class Transfers(Protocol):
    """Copies of one device. Any thread may call; copies of one direction run in the order in which they were asked
    for."""

    def mark(self) -> Any:
        """The point that the current stream has reached."""

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        """Copy `source` (device) to `target` (host, as many elements), not before the marked point. Neither may be
        touched until the copy is complete."""

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        """Copy `source` (host) to `target` (device), the same way."""

    def settle(self) -> None:
        """Returns when the device neither reads nor writes host memory any more."""


class Copies:
    """Several of them."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = list(copies)

    def wait_host(self) -> None:
        for copy in self._copies:
            copy.wait_host()

    def wait_device(self) -> None:
        for copy in self._copies:
            copy.wait_device()


class CudaCopy:
    __slots__ = ("_device", "_event")

    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def wait_host(self) -> None:
        self._event.synchronize()

    def wait_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaTransfers:
    """One stream for each direction: a GPU has a copy engine for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.down_stream, self.up_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> CudaCopy:
        return self._copy(self.down_stream, after, source, target)

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> CudaCopy:
        return self._copy(self.up_stream, after, source, target)

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def _copy(
        self,
        stream: torch.cuda.Stream,
        after: torch.cuda.Event,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> CudaCopy:
        stream.wait_event(after)
        # No record_stream: whoever frees the memory on the device has waited for the copy, and the allocator would keep
        # every block until it has seen so itself.
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # waiting threads sleep
        done.record(stream)
        return CudaCopy(self.device, done)
