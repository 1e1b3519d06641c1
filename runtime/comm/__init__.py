"""Collectives: in place, issued in the same order on every rank, timed and counted.

join      joins the process group: NCCL for GPUs, Gloo for CPUs
group     `Comm`, the collectives of one group
pending   collectives under way, on the host or on a GPU stream
shared_memory   collectives between ranks of one host without GPUs
objects   small values between ranks, as signed JSON
host_sums sums over ranks that run beside the training thread
transfer  copies between a GPU and its host
profiling       ranges for profilers

[Note: what a reduce-scatter leaves behind]
After `reduce_scatter(buffer)` and `wait()` this rank's shard of the buffer has the sum, and the other shards are
clobbered. `into(target, add)` instead of `wait()` leaves the sum in another tensor, which saves a pass over memory
wherever the ranks' buffers can be read directly.

Scripts written for DeepSpeed also find deepspeed.comm's functions here: torch.distributed's own, and init_distributed.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from runtime.comm.group import Comm
from runtime.comm.join import init_distributed, join_world
from runtime.comm.pending import Done, Pending

__all__ = ["Comm", "Done", "Pending", "get_local_rank", "init_distributed", "join_world"]

_TORCH = frozenset(
    [
        "ReduceOp",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object_list",
        "destroy_process_group",
        "gather",
        "get_backend",
        "get_global_rank",
        "get_rank",
        "get_world_group",
        "get_world_size",
        "irecv",
        "is_available",
        "is_initialized",
        "isend",
        "monitored_barrier",
        "new_group",
        "recv",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "scatter",
        "send",
    ]
)
"""Names of deepspeed.comm that torch.distributed has, too."""


def get_local_rank() -> int:
    """This rank's number on its host, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def __getattr__(name: str) -> Any:
    if name in _TORCH:
        return getattr(importlib.import_module("torch.distributed"), name)
    raise AttributeError(f"module 'runtime.comm' has no attribute {name!r}")
