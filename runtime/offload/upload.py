"""The way between a flat's states in host memory and its parameters on a device: gradients come down, new parameters go
up, and the device updates its share itself.

flat     |<------- the CPU's share ------->|<------------ the GPU's share ------------>|
thread   | update unit 0 -> slot A | update unit 1 -> slot B | update unit 2 -> slot A ...     page-locked: two
up       |                         | A -> GPU                | B -> GPU
through  | states of unit 0 | of unit 1 | of unit 2 ...        in chunks, down again when updated (optim/streamed.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from runtime import native
from runtime.comm.transfer import Copies, Copy, Transfers
from runtime.offload.download import Downlink
from runtime.plan.layout import ALIGNMENT
from runtime.zero.flat import Flat

if TYPE_CHECKING:
    from runtime.optim.shard_optimizer import AdamRule


class Streamer(Protocol):
    """Updates on the device, with states that stay on the host."""

    def update(
        self, pieces: Sequence[native.Range], hypers: Sequence[dict[str, Any]], scale: float, after: Any
    ) -> Copy:
        """pieces: states in host memory, gradients and outputs there or on the device. Nothing is touched before the
        marked point `after`; when the copy is complete, all is done."""


@dataclass
class HostSide:
    """Shared by the rules of all flats whose states are in other memory than their parameters. Only the thread that
    updates may use it."""

    transfers: Transfers
    downlink: Downlink
    buffers: list[torch.Tensor]
    """Page-locked byte buffers, each as large as the largest range of new parameters."""
    streamer: Streamer | None = None
    device_share: float = 0.0
    """Part of every flat that the device updates, 0 to 1. The bits don't depend on it."""
    after: Any = None
    """The computing stream's point up to which the old parameters are read."""
    _copies: list[Copy | None] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._copies = [None] * len(self.buffers)

    def split(self, numel: int) -> int:
        """Elements [0, split) are the CPU's, the rest is the device's."""
        if self.streamer is None:
            return numel
        return numel - min(numel, round(self.device_share * numel / ALIGNMENT) * ALIGNMENT)

    def update(self, rule: AdamRule, hypers: Sequence[dict[str, Any]], scale: float) -> None:
        """AdamW on one flat. `flat.arrival` is complete when its new parameters are where they are used."""
        from runtime.optim.shard_optimizer import update_pieces

        flat, numel = rule.flat, rule.flat.state_numel
        split = self.split(numel)
        done: list[Copy] = []
        if split < numel:
            assert self.streamer is not None
            # fp32 parameters that wait on the host are their own masters
            out = None if flat.own_parameters is flat.masters else flat.own_parameters[split:]
            pieces = rule.pieces(split, numel, flat.gradient[split:], out)
            done.append(self.streamer.update(pieces, hypers, scale, self.after))
        if split > 0:
            gradient = self.gradient(flat, split)
            out, send = self._outgoing(flat, split)
            update_pieces(rule.pieces(0, split, gradient, out), hypers, scale)
            done += send()
        flat.arrival = Copies(done)

    def gradient(self, flat: Flat, end: int | None = None) -> torch.Tensor:
        """Elements [0, end) of the flat's gradient in host memory. Below stage 2 they come down only now, to memory
        that the next call takes."""
        if flat.policy.own_gradients:
            return flat.gradient[:end]
        return self.downlink.fetch(flat.gradient[:end], self.after)

    def deliver(self, flat: Flat) -> None:
        """All of the flat's masters, rounded, go to its parameters."""
        out, send = self._outgoing(flat, flat.state_numel)
        if out is not None:
            out.copy_(flat.masters)
        flat.arrival = Copies(send())

    def _outgoing(self, flat: Flat, end: int) -> tuple[torch.Tensor | None, Any]:
        """Where to leave elements [0, end) of the new parameters (None: they are the masters), and a function that
        sends them on and returns the copies."""
        own = flat.own_parameters[:end]
        if not flat.apart:  # offloaded parameters wait where their masters are
            return (None if flat.own_parameters is flat.masters else own), list
        if own.dtype == flat.masters.dtype:
            return None, lambda: [self.transfers.up(flat.masters[:end], own, self.after)]
        slot = self._sent % len(self.buffers)
        self._sent += 1
        if (last := self._copies[slot]) is not None:
            last.wait_host()
        out = self.buffers[slot][: own.numel() * own.element_size()].view(own.dtype)

        def send() -> list[Copy]:
            copy = self._copies[slot] = self.transfers.up(out, own, self.after)
            return [copy]

        return out, send
