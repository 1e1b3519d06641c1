"""The trainers that are compared, at one rank: the same model, data and clipping; each returns a function that does one
optimizer step."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.offload.tracing import Trace
from runtime.config.presets import PRESETS, GPTConfig
from runtime.models.gpt import GPT
from runtime.plan.flops import flops_per_token, gpt_weights

ACCUMULATION = 4
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


class Job(NamedTuple):
    shape: GPTConfig
    micro_batch: int
    seq: int
    device: torch.device

    def model(self) -> GPT:
        torch.manual_seed(0)
        with self.device:  # the host has no room for the fp32 weights beside the offloaded states of a large model
            return GPT(self.shape)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(self.shape.vocab_size, (self.micro_batch, self.seq + 1), generator=generator)
        rows = rows.to(self.device)
        return rows[:, :-1], rows[:, 1:]

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.micro_batch * self.seq * ACCUMULATION

    @property
    def flops(self) -> float:
        """Model FLOPs of one optimizer step (runtime/plan/flops.py)."""
        return flops_per_token(self.shape, gpt_weights(self.shape), self.seq).model * self.tokens


PACKAGES = {"torchao": "torchao", "deepspeed": "deepspeed"}
"""Mode -> the package that it needs."""


def missing_package(mode: str) -> str | None:
    """The package that a mode lacks here."""
    package = PACKAGES.get(mode)
    return package if package is not None and importlib.util.find_spec(package) is None else None


class Trainer(NamedTuple):
    step: Callable[[int], float]  # number -> loss
    trace: Trace | None = None  # of ours


def job(preset: str, micro_batch: int, seq: int, device: str) -> Job:
    full = PRESETS[preset]
    shape = GPTConfig(full.layers, full.heads, full.dim, full.vocab_size, max(seq, 1))
    return Job(shape, micro_batch, seq, torch.device(device, 0) if device == "cuda" else torch.device(device))


def _ours(job: Job, **zero: Any) -> Trainer:
    import runtime

    section = zero.pop("section", {})
    config = {**_config(job), "zero_optimization": {"stage": 2, **zero}, "zerotop": section}
    engine = runtime.initialize(model=job.model(), config=config)[0]
    trace = Trace(engine)
    return Trainer(_engine_step(job, engine), trace)


def _config(job: Job) -> dict[str, Any]:
    """What ours and DeepSpeed's have in common."""
    return {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": dict(ADAMW)},
    }


def _engine_step(job: Job, engine: Any) -> Callable[[int], float]:
    """DeepSpeed's calls and ours are the same. `engine.backward` is looked up each time: the trace replaces it."""

    def step(number: int) -> float:
        loss = torch.zeros(())
        for micro in range(ACCUMULATION):
            loss = engine(*job.batch(number * ACCUMULATION + micro))
            engine.backward(loss)
            engine.step()
        return loss.item()

    return step


_TO_CPU = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}


def _resident(job: Job) -> Trainer:
    return _ours(job)


def _offload(job: Job) -> Trainer:
    return _ours(job, **_TO_CPU)


def _no_overlap(job: Job) -> Trainer:
    return _ours(job, **_TO_CPU, section={"offload": {"overlap": False}})


def _by_cpu(job: Job) -> Trainer:
    return _ours(job, **_TO_CPU, section={"offload": {"update": "cpu"}})


def _by_gpu(job: Job) -> Trainer:
    return _ours(job, **_TO_CPU, section={"offload": {"update": "gpu"}})


def _torchao(job: Job) -> Trainer:
    """torchao's CPUOffloadOptimizer: neither clipping nor accumulation on the GPU in its offloaded form, so gradients
    accumulate in the parameters' precision, and are not clipped."""
    from torchao.prototype.low_bit_optim import CPUOffloadOptimizer

    model = job.model().to(job.device, torch.bfloat16)
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, fused=True, **ADAMW)
    return Trainer(_plain_step(job, model, optimizer))


def _deepspeed(job: Job) -> Trainer:
    cpu = job.device.type == "cpu"
    os.environ.update(_alone() | ({"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"} if cpu else {}))
    import deepspeed

    deepspeed.init_distributed("gloo" if cpu else "nccl")
    zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, **_TO_CPU}
    engine = deepspeed.initialize(model=job.model(), config={**_config(job), "zero_optimization": zero})[0]
    return Trainer(_engine_step(job, engine))


def _fsdp2(job: Job) -> Trainer:
    """torch's FSDP2 with nothing offloaded: bf16 compute, fp32 masters, gradients and states on the device, parameters
    unsharded between forward and backward as at stage 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    os.environ.update(_alone())
    cuda = job.device.type == "cuda"
    torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=job.device if cuda else None)
    mesh = init_device_mesh(job.device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = job.model().to(job.device)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)
    return Trainer(_plain_step(job, model, optimizer, clip=True))


def _alone() -> dict[str, str]:
    """The environment of a world of one rank."""
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _plain_step(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, clip: bool = False
) -> Callable[[int], float]:
    def step(number: int) -> float:
        loss = torch.zeros(())
        for micro in range(ACCUMULATION):
            loss = model(*job.batch(number * ACCUMULATION + micro))
            (loss / ACCUMULATION).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


MODES: dict[str, Callable[[Job], Trainer]] = {
    "resident": _resident,
    "offload": _offload,
    "no-overlap": _no_overlap,
    "by-cpu": _by_cpu,
    "by-gpu": _by_gpu,
    "torchao": _torchao,
    "deepspeed": _deepspeed,
    "fsdp2": _fsdp2,
}
"""resident: nothing offloaded. offload: as configured by default (`update: auto`, overlapping). no-overlap, by-cpu,
by-gpu: the same with one key changed. torchao, deepspeed: where they are installed. fsdp2: nothing offloaded."""
