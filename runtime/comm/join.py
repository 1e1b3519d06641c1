"""Joining the process group that the launcher's environment describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.config import ConfigError
from runtime.process.file_limit import raise_file_limit
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, read_run


def join_world(device: str = "auto") -> torch.device:
    """Join the process group that the launcher's environment describes (or a world of one), unless the script has done
    so already.

    device: "cpu", "cuda" or "auto" (CUDA when there is one). Returns this rank's device. NCCL serves GPUs and Gloo
    CPUs.
    """
    raise_file_limit()
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


def init_distributed(dist_backend: str | None = None, **_deepspeed_only: Any) -> torch.device:
    """Join the process group (NCCL on GPUs, else Gloo), as `torchrun` or `zerotop launch` set it up. Returns this
    rank's device.

    dist_backend: "gloo" keeps the ranks on CPUs. DeepSpeed's other arguments are accepted and not needed.
    """
    return join_world("cpu" if dist_backend == "gloo" else os.environ.get("ZEROTOP_DEVICE", "auto"))
