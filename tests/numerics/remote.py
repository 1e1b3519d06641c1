"""A device that is not the host, played by the host: copies that happen as late as the waiting code allows, or at once.

Late copies read their source only when somebody waits, so one that was overwritten meanwhile gives wrong results; and
their target holds NaN until then, so reading it too early does, too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

import runtime.placing
from runtime.transfer import Copy


class LateCopy:
    def __init__(self, stream: LateStream, number: int) -> None:
        self._stream, self._number = stream, number

    def wait_host(self) -> None:
        self._stream.run(self._number)

    wait_device = wait_host


class LateStream:
    """Copies in the order in which they were asked for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._done = 0
        self._lock = threading.Lock()

    def add(self, source: torch.Tensor, target: torch.Tensor) -> LateCopy:
        assert source.dtype == target.dtype and source.shape == target.shape
        with self._lock:
            target.fill_(float("nan"))
            self._waiting.append((source, target))
            return LateCopy(self, self._done + len(self._waiting))

    def run(self, number: int) -> None:
        with self._lock:
            while self._done < number:
                source, target = self._waiting.pop(0)
                target.copy_(source)
                self._done += 1


class LateTransfers:
    def __init__(self) -> None:
        self._down, self._up = LateStream(), LateStream()

    def mark(self) -> None:
        return None

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        return self._down.add(source, target)

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        return self._up.add(source, target)


class PromptTransfers(LateTransfers):
    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        copy = super().down(source, target, after)
        copy.wait_host()
        return copy

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        copy = super().up(source, target, after)
        copy.wait_host()
        return copy


KINDS = {"late": LateTransfers, "prompt": PromptTransfers}


@contextlib.contextmanager
def remote_device(kind: str) -> Iterator[None]:
    """Engines made inside take the host's own memory for a device's."""
    before = runtime.placing.transfers_for
    runtime.placing.transfers_for = lambda _device: KINDS[kind]()
    try:
        yield
    finally:
        runtime.placing.transfers_for = before
