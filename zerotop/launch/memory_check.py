"""Whether a run will find the memory that its plan needs, before its ranks load anything. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pynvml

from runtime.config import Resolved
from runtime.host.memory_limits import Limits, read_limits
from runtime.plan import stage_layout
from runtime.plan.memory import Layout
from runtime.plan.workload import Workload, built_in_workload
from zerotop.format import bytes_text
from zerotop.probe.nvml import list_devices, read

WAY_OUT = "the run will probably run out of memory; `zerotop plan` shows which settings would fit"


def memory_warnings(
    resolved: Resolved, folder: Path, limits: Limits | None = None, free_gpus: Sequence[int] | None = None
) -> list[str]:
    """A sentence for each memory of which the plan needs more than is free; none where the model isn't known (a
    script's). limits: of this host. free_gpus: bytes that are free on each GPU of the run."""
    workload = built_in_workload(resolved, folder)
    if workload is None:
        return []
    offload = resolved.offload_optimizer is not None
    layout = stage_layout(workload, resolved.stage, offload, None if offload else resolved.offload_param is not None)
    found = []
    if workload.device == "cuda":
        free = free_gpu_bytes() if free_gpus is None else free_gpus
        found += _of_gpus(workload, layout, free[: workload.world_size])
    return found + _of_host(workload, layout, limits or read_limits())


def _of_gpus(workload: Workload, layout: Layout, free: Sequence[int]) -> list[str]:
    short = [(number, size) for number, size in enumerate(free) if size < layout.gpu_bytes]
    if not short:
        return []
    number, size = min(short, key=lambda one: one[1])
    more = len(short) - 1
    others = f", and {more} other GPU{'s have' if more > 1 else ' has'} too little, too" if more else ""
    need = ("" if workload.shape is not None else "at least ") + bytes_text(layout.gpu_bytes)
    return [f"the plan needs {need} on each GPU, and GPU {number} has {bytes_text(size)} free{others}: {WAY_OUT}"]


def _of_host(workload: Workload, layout: Layout, limits: Limits) -> list[str]:
    need = layout.host_bytes
    if workload.device == "cpu":
        need += layout.gpu_bytes * workload.world_size
    free = min(limits.available_bytes, limits.group_left_bytes)
    if need <= free:
        return []
    return [f"the plan needs {bytes_text(need)} of host RAM, and {bytes_text(int(free))} are free: {WAY_OUT}"]


def free_gpu_bytes() -> list[int]:
    """What is free on each GPU that ranks see, in their order; of those before the first that is not known."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        samples = [read(device) for device in list_devices(pynvml, [])]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()
    free: list[int] = []
    for name in visible(len(samples)):
        sample = next((one for one in samples if name in (str(one.index), one.uuid)), None)
        if sample is None or sample.used_bytes is None or sample.total_bytes is None:
            break
        free.append(sample.total_bytes - sample.used_bytes)
    return free


def visible(count: int) -> list[str]:
    """Indices or UUIDs of the GPUs that CUDA_VISIBLE_DEVICES leaves, of `count`."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if given is None else [part.strip() for part in given.split(",")]
