"""Joins the process group that the launcher's environment describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from runtime.config import ConfigError
from runtime.host.rss_parts import account
from runtime.process.file_limit import raise_file_limit
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, read_run
from runtime.wire.startnote import tell_start


def join_world(device: str = "auto") -> torch.device:
    """Join the process group that the launcher's environment describes (or a world of one), unless the script has done
    so already. Returns this rank's device.

    device: "cpu" (Gloo), "cuda" (NCCL) or "auto": what `zerotop launch` has chosen, else CUDA if torch can use a GPU.

    Raises ConfigError if the ranks are meant to be on GPUs and this one can use none: a run that was planned for them
    would otherwise crawl along on the CPU.
    """
    raise_file_limit()
    account().note_baseline()
    run = os.environ.get(RUN_VARIABLE)
    if device == "auto" and run and not (known := read_run(Path(run))).wrapped:
        device = known.device
    want_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local_rank) if want_cuda else torch.device("cpu")
    if dist.is_initialized() and dist.get_backend() == "gloo":
        return torch.device("cpu")  # the script has chosen Gloo
    if want_cuda:
        if problem := _cuda_problem():
            raise ConfigError(f"this run is on GPUs, but {problem}")
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()} GPUs. Start as many "
                "ranks per node as it has GPUs, or train on the CPU (ZEROTOP_DEVICE=cpu)"
            )
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        tell_start("waiting for the other ranks")
        backend = "nccl" if want_cuda and dist.is_nccl_available() else "gloo"
        if run:
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


def _cuda_problem() -> str:
    """Why torch can use no GPU here, with the way out; "" if it can."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch, or train on the CPU "
            "(--device cpu)"
        )
    try:
        torch.cuda.init()
        reason = "it finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use one: {reason}. Update the NVIDIA "
        "driver or install a torch for an older CUDA, or train on the CPU (--device cpu)"
    )


def _store_file(run: str) -> str:
    """File of the store through which the ranks of a run find each other. It is in the run's private sockets folder,
    because torch's TCP store listens on every interface and trusts whoever connects."""
    attempt = os.environ.get(ATTEMPT_VARIABLE, "1")
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return str(Path(read_run(Path(run)).sockets) / f"group-{attempt}-{restart}")


def init_distributed(dist_backend: str | None = None, **_deepspeed_only: Any) -> torch.device:
    """Join the process group that `torchrun` or `zerotop launch` describes (NCCL on GPUs, else Gloo). Returns this
    rank's device.

    dist_backend: "gloo" keeps the ranks on CPUs. DeepSpeed's other arguments are accepted and not needed.
    """
    return join_world("cpu" if dist_backend == "gloo" else os.environ.get("ZEROTOP_DEVICE", "auto"))
