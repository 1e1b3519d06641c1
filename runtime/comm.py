"""Collectives: in place, in one order on every rank, each timed and counted.

Reduce-scatter is "in place and the rest is clobbered": afterwards the own range of the buffer holds the sum, the other
ranges hold nothing of use. That lets Gloo use its all_reduce (its reduce-scatter is a cloned all_reduce, at twice the
time) and NCCL its real reduce-scatter.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.config import ConfigError
from runtime.telemetry import NullTelemetry, Telemetry
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, read_run

# torch 2.13 renames both; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way. `wait()` makes its result usable by the caller (on CUDA: by the current stream)."""

    __slots__ = ("_comm", "_end_ns", "_issue_ns", "_nbytes", "_op", "_seq", "_work")

    def __init__(self, comm: Comm, op: str, nbytes: int, start: Callable[[], Any]) -> None:
        self._comm, self._op, self._nbytes = comm, op, nbytes
        self._seq = comm.telemetry.issued(op, nbytes)
        self._end_ns = 0
        self._issue_ns = time.monotonic_ns()
        self._work = start()
        if comm.timed_by_future:
            # Runs on the backend's thread as the collective ends: later, in wait(), its end could only be guessed.
            self._work.get_future().add_done_callback(self._ended)

    def _ended(self, _future: Any) -> None:
        self._end_ns = time.monotonic_ns()

    def wait(self) -> None:
        before = time.monotonic_ns()
        self._work.wait()
        after = time.monotonic_ns()
        end = self._end_ns or after
        self._comm.telemetry.completed(self._seq, self._op, self._nbytes, self._issue_ns, end, after - before)


class Done:
    """What a world of one gets back: nothing to wait for."""

    def wait(self) -> None:
        return None


class Comm:
    """The collectives of one process group, for tensors on one device."""

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
        self.timed_by_future = self.backend == "gloo"
        self._control_group: dist.ProcessGroup | None = None

    def all_reduce(self, buffer: torch.Tensor) -> Pending | Done:
        """Sum `buffer` (any shape) over ranks, in place."""
        if self.world_size == 1:
            return Done()
        return Pending(
            self, "all_reduce", _nbytes(buffer), lambda: dist.all_reduce(buffer, group=self.group, async_op=True)
        )

    def reduce_scatter(self, buffer: torch.Tensor) -> Pending | Done:
        """Sum `buffer` (1-D, a multiple of the world size) over ranks into this rank's range of it; the other ranges
        are clobbered."""
        if self.world_size == 1:
            return Done()
        if self.backend == "gloo":
            return Pending(
                self,
                "reduce_scatter",
                _nbytes(buffer),
                lambda: dist.all_reduce(buffer, group=self.group, async_op=True),
            )
        own = self.own_range(buffer)
        return Pending(
            self,
            "reduce_scatter",
            _nbytes(buffer),
            lambda: _reduce_scatter(own, buffer, group=self.group, async_op=True),
        )

    def all_gather(self, buffer: torch.Tensor) -> Pending | Done:
        """Fill `buffer` (1-D, a multiple of the world size) from every rank's range of it, in place."""
        if self.world_size == 1:
            return Done()
        own = self.own_range(buffer)
        return Pending(
            self, "all_gather", _nbytes(buffer), lambda: _all_gather(buffer, own, group=self.group, async_op=True)
        )

    def broadcast(self, buffer: torch.Tensor, source: int = 0) -> None:
        if self.world_size > 1:
            Pending(
                self,
                "broadcast",
                _nbytes(buffer),
                lambda: dist.broadcast(buffer, source, group=self.group, async_op=True),
            ).wait()

    def broadcast_bytes(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Broadcast a tensor of any dtype and layout, also those that the backend has no arithmetic for."""
        if self.world_size > 1 and tensor.numel() > 0:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            self.broadcast(flat, source)
            tensor.detach().copy_(flat.view(tensor.dtype).view(tensor.shape))

    def own_range(self, buffer: torch.Tensor) -> torch.Tensor:
        numel = buffer.numel() // self.world_size
        return buffer[self.rank * numel : (self.rank + 1) * numel]

    # ---- small things between ranks, on the host -----------------------------------------------------------
    @property
    def control_group(self) -> dist.ProcessGroup:
        """A Gloo group over the same ranks. Every rank must ask for it first at the same point, for making a group is
        collective."""
        if self._control_group is None:
            self._control_group = dist.new_group(backend="gloo")
        return self._control_group

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (picklable, from our own code only) on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def init_distributed(device: str = "auto") -> torch.device:
    """Join the process group that the launcher's environment describes (or a world of one), unless the script has done
    so already.

    device: "cpu", "cuda" or "auto" (CUDA when there is one). Returns this rank's device. NCCL serves GPUs and Gloo
    CPUs.
    """
    want_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if want_cuda else torch.device("cpu")
    if dist.is_initialized() and dist.get_backend() == "gloo":
        return torch.device("cpu")  # the script has decided
    if want_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"this is rank {local_rank} of its node, and the node has {torch.cuda.device_count()} "
                "GPUs: start as many "
                "ranks as there are GPUs, or keep them on the CPU (ZEROTOP_DEVICE=cpu)"
            )
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        backend = "nccl" if want_cuda and dist.is_nccl_available() else "gloo"
        if run := os.environ.get(RUN_VARIABLE):
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(
                backend,
                store=dist.FileStore(_store_file(run), world_size),
                rank=rank,
                world_size=world_size,
                device_id=chosen if want_cuda else None,
            )
        elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, device_id=chosen if want_cuda else None)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return chosen


def _store_file(run: str) -> str:
    """Where the ranks of a run meet. torch's usual TCP store listens on every interface and trusts whoever connects;
    the run's private sockets folder serves one node as well."""
    attempt = os.environ.get(ATTEMPT_VARIABLE, "1")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return str(Path(read_run(Path(run)).sockets) / f"group-{attempt}-{restart}")
