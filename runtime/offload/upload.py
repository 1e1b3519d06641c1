"""Updates of states in host memory: new parameters go up to the device, and the device may update a part itself.

flat     |<------- the CPU's share ------->|<------------ the GPU's share ------------>|
thread   | update unit 0 -> slot A | update unit 1 -> slot B | update unit 2 -> slot A ...     page-locked: two
up       |                         | A -> GPU                | B -> GPU
through  | states of unit 0 | of unit 1 | of unit 2 ...        in chunks, down again when updated (streamed.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from runtime import native
from runtime.comm.profiling import profiler_range
from runtime.comm.transfer import Copies, Copy, Transfers
from runtime.offload.download import GradOffload
from runtime.optim.shard_optimizer import OptimizerStep, ShardAdamW, update_pieces
from runtime.plan.layout import ALIGNMENT
from runtime.zero.flat import FlatParamGroup


class Streamer(Protocol):
    """Updates on the device, with states that stay on the host."""

    def update(
        self, pieces: Sequence[native.Range], hypers: Sequence[dict[str, Any]], scale: float, after: Any
    ) -> Copy:
        """pieces: states in host memory, gradients and outputs there or on the device. Nothing is touched before the
        marked point `after`; when the copy is complete, all is done."""


@dataclass
class ParamUpload:
    """Serves the optimizers of all shards whose states are in other memory than their parameters. For the updating
    thread only."""

    transfers: Transfers
    grad_offload: GradOffload
    buffers: list[torch.Tensor]
    """Page-locked byte buffers, each as large as the largest shard of new parameters."""
    streamer: Streamer | None = None
    device_share: float = 0.0
    """Part of every flat that the device updates, 0 to 1. The bits don't depend on it."""
    _copies: list[Copy | None] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._copies = [None] * len(self.buffers)

    def split(self, numel: int) -> int:
        """Elements [0, split) are the CPU's, the rest is the device's."""
        if self.streamer is None:
            return numel
        return numel - min(numel, round(self.device_share * numel / ALIGNMENT) * ALIGNMENT)

    def update(self, optimizer: ShardAdamW, hypers: Sequence[dict[str, Any]], step: OptimizerStep) -> Copy:
        """AdamW on one shard. The copy is complete when the new parameters are where they are used."""
        flat, numel = optimizer.flat, optimizer.flat.state_numel
        split = self.split(numel)
        done: list[Copy] = []
        if split < numel:
            assert self.streamer is not None
            # fp32 parameters that wait on the host are their own masters
            out = None if flat.param_shard is flat.masters else flat.param_shard[split:]
            pieces = optimizer.pieces(split, numel, flat.gradient[split:], out)
            done.append(self.streamer.update(pieces, hypers, step.scale, step.after))
        if split > 0:
            gradient = self.gradient(flat, step, split)
            out, send = self._outgoing(flat, split, step.after)
            update_pieces(optimizer.pieces(0, split, gradient, out), hypers, step.scale)
            done += send()
        return Copies(done)

    def gradient(self, flat: FlatParamGroup, step: OptimizerStep, end: int | None = None) -> torch.Tensor:
        """Elements [0, end) of the flat's gradient in host memory. Below stage 2 they come down only now, to memory
        that the next call takes."""
        if flat.policy.shards_gradients:
            return flat.gradient[:end]
        with profiler_range("download", flat.policy.stage, flat.name):
            return self.grad_offload.fetch(flat.gradient[:end], step.after)

    def deliver(self, flat: FlatParamGroup, step: OptimizerStep) -> Copy:
        """Send all masters of the shard, rounded, to its parameters."""
        out, send = self._outgoing(flat, flat.state_numel, step.after)
        if out is not None:
            out.copy_(flat.masters)
        return Copies(send())

    def _outgoing(self, flat: FlatParamGroup, end: int, after: Any) -> tuple[torch.Tensor | None, Any]:
        """Where to leave elements [0, end) of the new parameters (None: they are the masters), and a function that
        sends them on and returns the copies."""
        own = flat.param_shard[:end]
        if not flat.masters_in_other_memory:  # offloaded parameters wait where their masters are
            return (None if flat.param_shard is flat.masters else own), list
        if own.dtype == flat.masters.dtype:
            return None, lambda: [self._up(flat, flat.masters[:end], own, after)]
        slot = self._sent % len(self.buffers)
        self._sent += 1
        if (last := self._copies[slot]) is not None:
            last.wait_host()
        out = self.buffers[slot][: own.numel() * own.element_size()].view(own.dtype)

        def send() -> list[Copy]:
            copy = self._copies[slot] = self._up(flat, out, own, after)
            return [copy]

        return out, send

    def _up(self, flat: FlatParamGroup, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        with profiler_range("upload", flat.policy.stage, flat.name):
            return self.transfers.up(source, target, after)
