"""A device that is not the host, played by the host: copies that happen as late as the waiting code allows, or at once.

Late copies read their source only when somebody waits, so one that was overwritten meanwhile gives wrong results; and
their target holds NaN until then, so reading it too early does, too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import runtime.engine.build
import runtime.offload.placement
from runtime import native
from runtime.comm.transfer import Copy
from runtime.optim.shard_optimizer import update_pieces


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

    def run_all(self) -> None:
        self.run(self._done + len(self._waiting))

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

    def settle(self) -> None:
        for stream in (self._down, self._up):
            stream.run_all()


class PromptTransfers(LateTransfers):
    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        copy = super().down(source, target, after)
        copy.wait_host()
        return copy

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        copy = super().up(source, target, after)
        copy.wait_host()
        return copy


class LateStreamer:
    """Updates states where they are when somebody waits; `out` is NaN until then."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def update(
        self,
        pieces: Sequence[native.Range],
        hypers: Sequence[dict[str, Any]],
        scale: float | torch.Tensor,
        after: Any,
        changed: torch.Tensor | None = None,
    ) -> Copy:
        old = [piece.out.clone() if piece.out is not None else None for piece in pieces]

        def call() -> None:
            for piece, out in zip(pieces, old, strict=True):
                if piece.out is not None and out is not None:
                    piece.out.copy_(out)
            update_pieces(pieces, hypers, scale, changed)

        with self._lock:
            for piece in pieces:
                if piece.out is not None:
                    piece.out.fill_(float("nan"))
            self._calls.append(call)
            return _LateCall(self, len(self._calls))

    def run(self, number: int) -> None:
        with self._lock:
            for index in range(number):
                call, self._calls[index] = self._calls[index], _nothing
                call()


class _LateCall:
    def __init__(self, streamer: LateStreamer, number: int) -> None:
        self._streamer, self._number = streamer, number

    def wait_host(self) -> None:
        self._streamer.run(self._number)

    wait_device = wait_host


def _nothing() -> None:
    return None


KINDS = {"late": LateTransfers, "prompt": PromptTransfers}


@contextlib.contextmanager
def remote_device(kind: str, share: float | None = None) -> Iterator[None]:
    """Engines made inside take the host's own memory for a device's. share: of every update, that is the device's."""
    before = (
        runtime.engine.build.transfers_for,
        runtime.offload.placement.streamer_for,
        runtime.offload.placement._measured_share,
    )
    runtime.engine.build.transfers_for = lambda _device: KINDS[kind]()
    if share is not None:
        runtime.offload.placement.streamer_for = lambda *_given: LateStreamer()
        runtime.offload.placement._measured_share = lambda *_given: share
    try:
        yield
    finally:
        (
            runtime.engine.build.transfers_for,
            runtime.offload.placement.streamer_for,
            runtime.offload.placement._measured_share,
        ) = before
