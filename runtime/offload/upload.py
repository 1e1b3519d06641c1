"""Updates states in host memory and uploads the new parameters to the device, which may update a share itself.

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
from runtime.optim.shard_optimizer import OptimizerStep, ShardAdamW
from runtime.plan.layout import ALIGNMENT
from runtime.zero.flat import FlatParamGroup


class Streamer(Protocol):
    """Updates states in host memory on the device, through which they stream."""

    def update(
        self,
        pieces: Sequence[native.Range],
        hypers: Sequence[dict[str, Any]],
        scale: float | torch.Tensor,
        after: Any,
        changed: torch.Tensor | None = None,
    ) -> Copy:
        """Start AdamW on `pieces`, whose states are in host memory, gradients and outputs there or on the device.
        Nothing is read or written before the mark `after`; the update is done when the copy is complete. scale: on the
        gradients; a tensor, and `changed`, are read on the device as StepDecision has them."""


@dataclass
class ParamUpload:
    """Updates all shards whose states are in other memory than their parameters (OffloadedStates). For the offload
    thread only."""

    transfers: Transfers
    grad_offload: GradOffload
    buffers: list[torch.Tensor]
    """Pinned uint8 buffers, each as large as the largest shard of new parameters."""
    streamer: Streamer | None = None
    device_share: float = 0.0
    """Share of every group that the device updates, 0 to 1. Results are bit-identical for any share."""
    _copies: list[Copy | None] = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._copies = [None] * len(self.buffers)

    def split(self, numel: int) -> int:
        """How many of `numel` elements the CPU updates; the device updates those after them."""
        if self.streamer is None:
            return numel
        return numel - min(numel, round(self.device_share * numel / ALIGNMENT) * ALIGNMENT)

    def update(self, optimizer: ShardAdamW, hypers: Sequence[dict[str, Any]], step: OptimizerStep) -> Copy:
        """See OffloadedStates."""
        flat, numel = optimizer.flat, optimizer.flat.state_numel
        split = self.split(numel)
        done: list[Copy] = []
        scale: float | torch.Tensor | None = step.decision.scale
        if scale is None:  # the device will not know it
            decided = step.decision.read()
            if decided.changed:
                self._follow(flat, numel, step.after)
            if not decided.taken:
                return Copies([])
            scale = decided.scale
        if split < numel:
            assert self.streamer is not None
            # offloaded fp32 parameters are their own masters
            out = None if flat.param_shard is flat.masters else flat.param_shard[split:]
            pieces = optimizer.pieces(split, numel, flat.gradient[split:], out)
            done.append(self.streamer.update(pieces, hypers, scale, step.after, step.decision.changed))
        if split > 0 and isinstance(scale, torch.Tensor):
            decided = step.decision.read()
            if decided.changed:
                self._follow(flat, split, step.after)
            if not decided.taken:
                return Copies(done)
            scale = decided.scale
        if split > 0:
            gradient = self.gradient(flat, step, split)
            out, send = self._outgoing(flat, split, step.after)
            optimizer.update_range(0, split, gradient, out, hypers, step.step, scale)
            done += send()
        return Copies(done)

    def _follow(self, flat: FlatParamGroup, end: int, after: Any) -> None:
        """Copy the first `end` parameters to the masters where the script has changed them on the device."""
        if flat.tracks_script_changes and flat.masters_in_other_memory:
            _, staged = self._buffer(flat.param_shard[:end])
            self.transfers.down(flat.param_shard[:end], staged, after).wait_host()
            flat.masters_follow(staged)

    def gradient(self, flat: FlatParamGroup, step: OptimizerStep, end: int | None = None) -> torch.Tensor:
        """(end,) the first elements of the group's gradient in host memory. Unless gradients are sharded (stages 2, 3),
        they are downloaded only now, to memory that the next call reuses."""
        if flat.policy.shards_gradients:
            return flat.gradient[:end]
        with profiler_range("download", flat.policy.stage, flat.name):
            return self.grad_offload.fetch(flat.gradient[:end], step.after)

    def deliver(self, flat: FlatParamGroup, step: OptimizerStep) -> Copy:
        """See OffloadedStates."""
        out, send = self._outgoing(flat, flat.state_numel, step.after)
        if out is not None:
            out.copy_(flat.masters)
        return Copies(send())

    def _outgoing(self, flat: FlatParamGroup, end: int, after: Any) -> tuple[torch.Tensor | None, Any]:
        """A tensor (end,) for the first elements of the new parameters (None: they are the masters), and a function
        that uploads them and returns the copies."""
        shard = flat.param_shard[:end]
        if not flat.masters_in_other_memory:  # parameters are offloaded, too
            return (None if flat.param_shard is flat.masters else shard), list
        if shard.dtype == flat.masters.dtype:
            return None, lambda: [self._up(flat, flat.masters[:end], shard, after)]
        slot, out = self._buffer(shard)

        def send() -> list[Copy]:
            copy = self._copies[slot] = self._up(flat, out, shard, after)
            return [copy]

        return out, send

    def _buffer(self, shard: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The number of a page-locked buffer that no copy reads any more, and memory in it of the size of `shard`."""
        slot = self._sent % len(self.buffers)
        self._sent += 1
        if (last := self._copies[slot]) is not None:
            last.wait_host()
        return slot, self.buffers[slot][: shard.numel() * shard.element_size()].view(shard.dtype)

    def _up(self, flat: FlatParamGroup, source: torch.Tensor, target: torch.Tensor, after: Any) -> Copy:
        with profiler_range("upload", flat.policy.stage, flat.name):
            return self.transfers.up(source, target, after)
