"""The arithmetic of a step, and the time that it takes at least on a GPU whose peak is known. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.plan.peaks import peak_tflops
from runtime.plan.workload import Workload

USUAL_MFU = 0.4
"""What well-tuned training of dense transformers reaches on A100 and H100."""


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a workload. Times are bounds by arithmetic alone: communication, offload, data and the optimizer come on
    top where they don't overlap."""

    model_flops_per_token: float
    hardware_flops_per_token: float
    """With the recomputation of activation checkpointing."""
    flops_per_step: float
    """Of one rank, without recomputation."""
    precision: str
    gpu: str | None = None
    peak_tflops: float | None = None
    """None: no GPU was named, or it has no matrix units for the precision."""
    bound_ms: float | None = None
    """The step at 100% MFU: no real step is faster."""
    bound_at_40_ms: float | None = None
    """The step at 40% MFU."""


def arithmetic_of(workload: Workload, gpu: str | None = None) -> Arithmetic | None:
    """The arithmetic of one step on GPUs called `gpu`; None if the FLOPs of the model are not known. Products of fp32
    count as fp32 units' (torch's default), not TF32's."""
    flops = workload.flops_per_token
    if flops is None:
        return None
    tokens = workload.micro_batch * workload.accumulation * workload.seq_len
    per_step = flops.model * tokens
    found = Arithmetic(flops.model, flops.hardware, per_step, workload.precision, gpu)
    tflops = peak_tflops(gpu, workload.precision) if gpu is not None else None
    if tflops is None:
        return found
    bound_ms = per_step / (tflops * 1e12) * 1000
    return replace(found, peak_tflops=tflops, bound_ms=bound_ms, bound_at_40_ms=bound_ms / USUAL_MFU)
