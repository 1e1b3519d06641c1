"""The collectives of one process group, for tensors on one device. See [Note: what a reduce-scatter leaves behind]."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from runtime.comm import objects
from runtime.comm.host_sums import HostSum
from runtime.comm.pending import (
    CopyPending,
    DeviceClock,
    DevicePending,
    Done,
    HostPending,
    Pending,
    SharedPending,
    waiting_for_ranks,
)
from runtime.comm.shared_memory import DTYPES, Exchange
from runtime.comm.transfer import Copy
from runtime.process.forked import at_exit
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.telemetry.device_time import DeviceTime, StreamMarks

# torch 2.13 renames both; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SHARED_MEMORY_VARIABLE = "ZEROTOP_SHARED_MEMORY"
"""Environment variable; if 0, ranks of one host use Gloo instead of shared memory."""

_shared: tuple[Any, dist.ProcessGroup] | None = None
"""The world's process group and its control group."""
_for_sums: tuple[Any, dist.ProcessGroup] | None = None
"""The world's process group and the group of sums on the host."""


def _leave_groups() -> None:
    """Destroy the process groups at exit, unless the script has: a Gloo group whose last reference is dropped by its
    own thread aborts the process."""
    global _shared, _for_sums
    groups = [pair for pair in (_for_sums, _shared) if pair is not None]
    _shared = _for_sums = None
    if not dist.is_initialized() or not any(world is dist.group.WORLD for world, _ in groups):
        return
    gc.collect()  # engines, and the collectives that they remember
    if dist.get_backend() == "gloo":
        dist.destroy_process_group()
        return
    for world, group in groups:
        if world is dist.group.WORLD:
            dist.destroy_process_group(group)


class Comm:
    """Collectives over all ranks of a group. Every rank issues them in the same order."""

    def __init__(
        self, device: torch.device, telemetry: Telemetry | NullTelemetry, group: dist.ProcessGroup | None = None
    ) -> None:
        self.group = group
        self.device = device
        self.telemetry = telemetry
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        # A group made without naming a backend says "undefined" and has Gloo for CPUs.
        self.backend = "gloo" if device.type == "cpu" else str(dist.get_backend(group))
        self._exchange: Exchange | None = None
        self._clock: DeviceClock | None = None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            device_time = DeviceTime(stream)
            telemetry.follow_device(StreamMarks(device, device_time))
            if self.world_size > 1:
                self._clock = DeviceClock(stream, device_time, telemetry)

    # ---- memory --------------------------------------------------------------------------------------------
    def share_memory(self, nbytes: int) -> None:
        """Use shared memory for the collectives, up to `nbytes` per rank, if all ranks are on one host and on CPUs.
        Collective."""
        if self.device.type == "cpu" and self.world_size > 1 and os.environ.get(SHARED_MEMORY_VARIABLE) != "0":
            self._exchange = Exchange.open(self.rank, self.world_size, nbytes, self.gather_objects)

    @property
    def shares_memory(self) -> bool:
        """Whether collectives use shared memory."""
        return self._exchange is not None

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) uninitialised on the device; in shared memory if collectives use it."""
        if self._exchange is not None:
            return self._exchange.empty(numel, dtype)
        return torch.empty(numel, dtype=dtype, device=self.device)

    def register_name(self, name: str) -> None:
        """Make the name of an all-gather known, so that errors can tell which one another rank has issued."""
        if self._exchange is not None:
            self._exchange.register_name(name)

    def release(self, buffer: torch.Tensor) -> None:
        """Free memory from `empty` before its tensor is collected. It must not be used any more."""
        if self._exchange is not None and self._exchange.holds(buffer):
            self._exchange.release(buffer)

    # ---- collectives -----------------------------------------------------------------------------------------
    def all_reduce(self, buffer: torch.Tensor) -> Pending:
        """Sum `buffer` (any shape) over ranks, in place."""
        if self.world_size == 1:
            return Done()
        if buffer.dtype in DTYPES and (exchange := self._exchange_for(buffer)) is not None:
            return self._shared("all_reduce", buffer, lambda: exchange.all_reduce(buffer))
        return self._start("all_reduce", buffer, lambda a: dist.all_reduce(buffer, group=self.group, async_op=a))

    def reduce_scatter(self, buffer: torch.Tensor) -> Pending:
        """Sum `buffer` (1-D, a multiple of the world size) over ranks into this rank's shard of it; the other shards
        are clobbered."""
        own = self.own_shard(buffer)
        if self.world_size == 1:
            return Done(own)
        if buffer.dtype in DTYPES and (exchange := self._exchange_for(buffer)) is not None:
            return self._shared("reduce_scatter", buffer, lambda: exchange.reduce_scatter(buffer))
        if self.backend == "gloo":  # its reduce-scatter is a cloned all-reduce, at twice the time
            return self._start(
                "reduce_scatter", buffer, lambda a: dist.all_reduce(buffer, group=self.group, async_op=a), own
            )
        return self._start(
            "reduce_scatter", buffer, lambda a: _reduce_scatter(own, buffer, group=self.group, async_op=a), own
        )

    def all_gather(self, full: torch.Tensor, shard: torch.Tensor, name: str = "", after: Copy | None = None) -> Pending:
        """All-gather every rank's `shard` into `full` (1-D, world size x shard), of which `shard` may be a view. name:
        what is all-gathered, for errors. after: a copy that writes `shard`; the all-gather waits for it, but the
        current stream does not."""
        if self.world_size == 1:
            return CopyPending(after) if after is not None else Done()
        if after is not None and self._clock is None:
            after.wait_host()
        if (exchange := self._exchange_for(shard)) is not None:
            return self._shared("all_gather", full, lambda: exchange.all_gather(full, shard, name))
        return self._start(
            "all_gather",
            full,
            lambda a: _all_gather(full.view(torch.uint8), shard.view(torch.uint8), group=self.group, async_op=a),
            after=after,
        )

    def broadcast(self, buffer: torch.Tensor, source: int = 0) -> None:
        """Copy `buffer` (any shape) from rank `source` to all ranks, and wait for it."""
        if self.world_size > 1:
            self._start(
                "broadcast", buffer, lambda a: dist.broadcast(buffer, source, group=self.group, async_op=a)
            ).wait()

    def broadcast_bytes(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Broadcast a tensor of any dtype and layout, byte for byte."""
        if self.world_size > 1 and tensor.numel() > 0:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            self.broadcast(flat, source)
            tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))

    def own_shard(self, buffer: torch.Tensor) -> torch.Tensor:
        """(numel / world size,) this rank's shard of `buffer`, as a view."""
        numel = buffer.numel() // self.world_size
        return buffer[self.rank * numel : (self.rank + 1) * numel]

    def _exchange_for(self, buffer: torch.Tensor) -> Exchange | None:
        return self._exchange if self._exchange is not None and self._exchange.holds(buffer) else None

    def _shared(self, op: str, buffer: torch.Tensor, start: Callable[[], Any]) -> Pending:
        return SharedPending(self.telemetry, op, _nbytes(buffer), start)

    def _start(
        self,
        op: str,
        buffer: torch.Tensor,
        start: Callable[[bool], Any],
        own: torch.Tensor | None = None,
        after: Copy | None = None,
    ) -> Pending:
        """Issue a collective of the backend with `start(async_op)`. after: on a GPU, a copy that its stream waits
        for."""
        if self._clock is not None:
            return DevicePending(self._clock, op, _nbytes(buffer), lambda: start(False), own, after)
        return HostPending(self.telemetry, op, _nbytes(buffer), lambda: start(True), own)

    # ---- sums on the host that nobody waits for: see host_sums.py -------------------------------------------
    def prepare_host_sums(self) -> None:
        """Make what `begin_host_sum` needs. Collective."""
        global _for_sums
        world = dist.group.WORLD
        if self.world_size > 1 and (_for_sums is None or _for_sums[0] is not world):
            _ = self.control_group  # which is closed at exit
            _for_sums = (world, dist.new_group(backend="gloo"))

    def begin_host_sum(self, own: Callable[[], Sequence[float]], count: int) -> HostSum:
        """Begin to sum `count` numbers over ranks. own: returns this rank's, on another thread, and may wait for them.
        Every rank begins the same sums in the same order."""
        assert self.world_size == 1 or _for_sums is not None
        group = _for_sums[1] if _for_sums is not None and self.world_size > 1 else None
        return HostSum(own, count, self.device, group, self.telemetry)

    # ---- small values between ranks, on the host -----------------------------------------------------------
    @property
    def control_group(self) -> dist.ProcessGroup:
        """A Gloo group over the same ranks. Making it is collective, so the first use must be at the same point on
        every rank. Engines of one process share it, because torch closes a group's sockets only when the world ends."""
        global _shared
        world = dist.group.WORLD
        if _shared is None or _shared[0] is not world:
            if _shared is None:
                at_exit(_leave_groups)
            _shared = (world, dist.new_group(backend="gloo"))
        return _shared[1]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (of a type that `objects.pack` supports) on every rank."""
        if self.world_size == 1:
            return value
        with waiting_for_ranks("broadcast_object"):
            return objects.broadcast(value, self.control_group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (of a type that `objects.pack` supports), in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        with waiting_for_ranks("gather_objects"):
            return objects.gather(value, self.control_group)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
