"""The peers: one builder each, from the same model to a function that does one optimizer step.

Libraries are imported inside the builders on purpose: what a peer loads counts as its memory, and a peer that is not
installed must not stop the others.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.peers.workload import GPT, Batches, Size

Step = Callable[[int], tuple[float, float]]
"""Number of the step -> (mean loss over this rank's micro-batches, seconds in the optimizer, clipping included)."""


@dataclass(frozen=True)
class Job:
    """What a builder gets; the same for every peer."""

    model: GPT
    batches: Batches
    size: Size
    bf16: bool
    lr: float
    clip: float
    foreach: bool
    """torch's AdamW with foreach=True instead of fused=True."""
    zero_options: dict[str, Any]
    """Merged into zero_optimization of DeepSpeed's and our own config."""

    @property
    def adamw(self) -> dict[str, Any]:
        return {"lr": self.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    @property
    def torch_adamw(self) -> dict[str, Any]:
        return {**self.adamw, ("foreach" if self.foreach else "fused"): True}


def join(peer: str) -> None:
    """Join the process group the way the peer wants it."""
    if peer.startswith("ds"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")


# ---- plain torch -----------------------------------------------------------------------------------------------------
def _nocomm(job: Job) -> Step:
    """No communication at all: the floor. Each rank trains a model of its own."""
    return _torch_step(job, job.model, torch.optim.AdamW(job.model.parameters(), **job.torch_adamw))


def _ddp(job: Job) -> Step:
    model = nn.parallel.DistributedDataParallel(job.model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), **job.torch_adamw)
    return _torch_step(job, model, optimizer, before_last=model.no_sync)


def _ddp_zro(job: Job) -> Step:
    """DDP with torch's ZeroRedundancyOptimizer: optimizer states shared out as in stage 1."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(job.model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, **job.torch_adamw)
    return _torch_step(job, model, optimizer, before_last=model.no_sync)


def _torch_step(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    before_last: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Step:
    """before_last: the context of every micro-step but the last one."""

    def step(number: int) -> tuple[float, float]:
        total = 0.0
        for micro_step in range(job.size.accumulation):
            last = micro_step == job.size.accumulation - 1
            with contextlib.nullcontext() if last else before_last():
                with torch.autocast("cpu", torch.bfloat16) if job.bf16 else contextlib.nullcontext():
                    loss = model(*job.batches(number, micro_step))
                (loss / job.size.accumulation).backward()
            total += loss.item()
        return total / job.size.accumulation, _clip_and_step(job, job.model.parameters(), optimizer)

    return step


def _fsdp2(job: Job, *, reshard: bool = True, sync_every_micro_step: bool = True) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if job.bf16 else MixedPrecisionPolicy()
    for module in [*job.model.blocks, job.model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    model: Any = job.model
    optimizer = torch.optim.AdamW(model.parameters(), **job.torch_adamw)

    def step(number: int) -> tuple[float, float]:
        total = 0.0
        for micro_step in range(job.size.accumulation):
            if not sync_every_micro_step:
                model.set_requires_gradient_sync(micro_step == job.size.accumulation - 1)
            loss = model(*job.batches(number, micro_step))
            (loss / job.size.accumulation).backward()
            total += loss.item()
        return total / job.size.accumulation, _clip_and_step(job, model.parameters(), optimizer)

    return step


def _clip_and_step(job: Job, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    nn.utils.clip_grad_norm_(parameters, job.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


# ---- engines: DeepSpeed and ours, same config, same calls ------------------------------------------------------------
def _deepspeed(job: Job, stage: int, offload: bool) -> Step:
    import deepspeed

    zero: dict[str, Any] = {"offload_param": _TO_CPU} if stage == 3 and offload else {}
    optimizer: torch.optim.Optimizer
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(job.model.parameters(), adamw_mode=True, **job.adamw)
    else:
        optimizer = torch.optim.AdamW(job.model.parameters(), **job.torch_adamw)
    config = _config(job, stage, offload, zero)
    return _engine_step(job, deepspeed.initialize(model=job.model, optimizer=optimizer, config=config)[0])


def _zerotop(job: Job, stage: int, offload: bool, gloo: bool = False) -> Step:
    """gloo: ranks exchange over Gloo, as those of several hosts do, not through shared memory."""
    import runtime
    from runtime import native

    if not native.available():  # it would measure the fallback: plain torch, and Gloo
        raise RuntimeError("our compiled kernels are not in this environment: run `make install` with its Python")
    if gloo:
        os.environ["ZEROTOP_SHARED_MEMORY"] = "0"

    config = _config(job, stage, offload, {})
    config["optimizer"] = {"type": "AdamW", "params": {**job.adamw, "betas": list(job.adamw["betas"])}}
    return _engine_step(job, runtime.initialize(model=job.model, config=config)[0])


_TO_CPU = {"device": "cpu", "pin_memory": False}


def _config(job: Job, stage: int, offload: bool, zero: dict[str, Any]) -> dict[str, Any]:
    offloaded = {"offload_optimizer": _TO_CPU} if offload else {}
    return {
        "train_micro_batch_size_per_gpu": job.size.micro_batch,
        "gradient_accumulation_steps": job.size.accumulation,
        "gradient_clipping": job.clip,
        "zero_optimization": {"stage": stage, **offloaded, **zero, **job.zero_options},
        "steps_per_print": 10**9,
        **({"bf16": {"enabled": True}} if job.bf16 else {}),
    }


def _engine_step(job: Job, engine: Any) -> Step:
    def step(number: int) -> tuple[float, float]:
        total, optimizer_s = 0.0, 0.0
        for micro_step in range(job.size.accumulation):
            loss = engine(*job.batches(number, micro_step))
            engine.backward(loss)
            total += loss.item()
            began = time.perf_counter()
            engine.step()
            optimizer_s = time.perf_counter() - began  # of the last micro-step, the one that updates
        return total / job.size.accumulation, optimizer_s

    return step


PEERS: dict[str, Callable[[Job], Step]] = {
    "nocomm": _nocomm,
    "ddp": _ddp,
    "ddp_zro": _ddp_zro,
    "fsdp2": _fsdp2,
    "fsdp2_nosync": partial(_fsdp2, sync_every_micro_step=False),
    "fsdp2_noreshard": partial(_fsdp2, reshard=False),
}
for _name, _build in {"ds": _deepspeed, "zt": _zerotop}.items():
    for _stage in range(4):
        PEERS[f"{_name}{_stage}"] = partial(_build, stage=_stage, offload=False)
    for _stage in range(1, 4):
        PEERS[f"{_name}{_stage}_offload"] = partial(_build, stage=_stage, offload=True)
for _stage in range(4):
    PEERS[f"zt{_stage}_gloo"] = partial(_zerotop, stage=_stage, offload=False, gloo=True)
