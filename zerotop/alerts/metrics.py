"""The metrics that an alert's rule can name, each read from the state of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from runtime.wire.messages import StepResult
from runtime.wire.node import GpuStats, NodeStats
from zerotop.format import bytes_text, count_text, duration_text, figure_text, ms_text, rate_text
from zerotop.state.efficiency import run_efficiency
from zerotop.state.memory import gpu_of
from zerotop.state.progress import progress, steps_at_risk
from zerotop.state.run import RankState, RunState

Dimension = Literal["number", "count", "bytes", "share", "seconds", "tokens/s", "W", "°C"]


@dataclass(frozen=True)
class Reading:
    """One value of a metric in its base unit. `rank`: whose it is; None for the run or a node. `where` names what it is
    about, if it is not the run."""

    value: float
    rank: int | None = None
    where: str = ""


Reader = Callable[[RunState], Iterator[Reading]]


@dataclass(frozen=True)
class Metric:
    """`readers`: by the dimension of the value that the rule compares with, because `vram > 70GiB` and `vram > 95%`
    are both a sentence."""

    name: str
    description: str
    readers: Mapping[Dimension, Reader] = field(repr=False)
    needs_gpu: bool = False


def value_text(value: float, dimension: Dimension) -> str:
    """A value as the screen writes it."""
    match dimension:
        case "bytes":
            return bytes_text(value)
        case "share":
            return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"
        case "seconds":
            return ms_text(1000 * value) if abs(value) < 60 else duration_text(value)
        case "tokens/s":
            return rate_text(value)
        case "W" | "°C":
            return f"{value:,.0f} {dimension}"
        case "count":
            return count_text(value) if abs(value) >= 1e6 else f"{value:,.0f}"
        case "number":
            return figure_text(value)


# ---- the run ---------------------------------------------------------------------------------------------------------
def newest_step(state: RunState) -> StepResult | None:
    """The newest optimizer step of any rank; None before the first of this attempt."""
    return max((rank.step for rank in state.ranks.values() if rank.step), key=lambda step: step.step, default=None)


def _of_step(read: Callable[[StepResult], float | None]) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        step = newest_step(state)
        value = read(step) if step is not None else None
        if value is not None:
            yield Reading(value)

    return reader


def _of_run(read: Callable[[RunState], float | None]) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        value = read(state)
        if value is not None:
            yield Reading(value)

    return reader


def _evaluation_loss(state: RunState) -> float | None:
    newest = state.evaluations.newest
    return newest.loss if newest is not None else None


# ---- ranks -----------------------------------------------------------------------------------------------------------
def _of_ranks(read: Callable[[RankState], float | None]) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        for number, rank in sorted(state.ranks.items()):
            if rank.goodbye is None and (value := read(rank)) is not None:
                yield Reading(value, number, f"rank {number}")

    return reader


def vram_bytes(state: RunState, rank: RankState) -> tuple[int | None, int | None]:
    """(used, total) of the rank's GPU: what the driver says about the device, all processes together; else what torch
    has reserved. None where it is not known."""
    gpu, memory = gpu_of(state, rank), rank.memory
    if gpu is not None and gpu.used_bytes is not None:
        return gpu.used_bytes, gpu.total_bytes
    if memory is None or memory.device_total_bytes is None:
        return None, None
    used = memory.device_used_bytes if memory.device_used_bytes is not None else memory.reserved_bytes
    return (used if used is not None else memory.allocated_bytes), memory.device_total_bytes


def _vram(share: bool) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        for number, rank in sorted(state.ranks.items()):
            used, total = vram_bytes(state, rank)
            if used is None or rank.goodbye is not None or (share and not total):
                continue
            yield Reading(used / total if share and total else float(used), number, f"rank {number}")

    return reader


def _wait_share(rank: RankState) -> float | None:
    return rank.step.wait_ms / rank.step.step_ms if rank.step is not None and rank.step.step_ms > 0 else None


# ---- GPUs and nodes --------------------------------------------------------------------------------------------------
def _of_gpus(read: Callable[[GpuStats], float | None]) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        for number, rank in sorted(state.ranks.items()):
            gpu = gpu_of(state, rank)
            if gpu is not None and (value := read(gpu)) is not None:
                yield Reading(value, number, f"rank {number}")

    return reader


def _of_nodes(read: Callable[[NodeStats], float | None]) -> Reader:
    def reader(state: RunState) -> Iterator[Reading]:
        for host, node in sorted(state.nodes.items()):
            if (value := read(node)) is not None:
                yield Reading(value, None, host)

    return reader


def _ram_used(node: NodeStats) -> float:
    if node.ram_available_bytes is not None:
        return float(max(0, node.ram_total_bytes - node.ram_available_bytes))
    return float(node.ram_used_bytes)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "training loss of the newest step", {"number": _of_step(lambda step: step.loss)}),
        Metric("eval_loss", "loss of the newest evaluation", {"number": _of_run(_evaluation_loss)}),
        Metric("lr", "learning rate", {"number": _of_step(lambda step: step.lr)}),
        Metric("grad_norm", "global gradient norm", {"number": _of_step(lambda step: step.grad_norm)}),
        Metric("loss_scale", "loss scale (fp16)", {"number": _of_step(lambda step: step.loss_scale)}),
        Metric("skipped_steps", "steps skipped so far", {"count": _of_step(lambda step: float(step.skipped_steps))}),
        Metric("step", "optimizer steps taken", {"count": _of_run(lambda state: float(state.step))}),
        Metric("unsaved_steps", "steps since the newest checkpoint",
               {"count": _of_run(lambda state: float(steps_at_risk(state)))}),
        Metric("restarts", "automatic restarts since the launch",
               {"count": _of_run(lambda state: float(state.status.restarts) if state.status else None)}),
        Metric("step_time", "time of an optimizer step, median of the newest 20",
               {"seconds": _of_run(lambda state: _scaled(progress(state).step_ms, 1e-3))}),
        Metric("tokens_per_s", "tokens per second of all ranks",
               {"tokens/s": _of_run(lambda state: progress(state).tokens_per_s)}),
        Metric("mfu", "model FLOPs utilization", {"share": _of_run(lambda state: run_efficiency(state).mfu)}),
        Metric("wait", "for how long a rank waited for others in the newest step, as time or as share of the step",
               {"seconds": _of_ranks(lambda rank: _scaled(rank.step.wait_ms, 1e-3) if rank.step else None),
                "share": _of_ranks(_wait_share)}),
        Metric("rss", "host memory of a rank's process",
               {"bytes": _of_ranks(lambda rank: float(rank.memory.rss_bytes) if rank.memory else None)}),
        Metric("vram", "memory used on a rank's GPU, by all processes", {"share": _vram(True), "bytes": _vram(False)},
               needs_gpu=True),
        Metric("gpu_utilization", "share of the time in which a kernel ran",
               {"share": _of_gpus(lambda gpu: _scaled(gpu.utilization_percent, 0.01))}, needs_gpu=True),
        Metric("gpu_temperature", "temperature of a rank's GPU",
               {"°C": _of_gpus(lambda gpu: gpu.temperature_c)}, needs_gpu=True),
        Metric("gpu_power", "power of a rank's GPU", {"W": _of_gpus(lambda gpu: gpu.power_w)}, needs_gpu=True),
        Metric("gpu_ecc_errors", "uncorrected errors of a GPU's memory since the driver was loaded",
               {"count": _of_gpus(lambda gpu: None if gpu.ecc_uncorrected is None else float(gpu.ecc_uncorrected))},
               needs_gpu=True),
        Metric("cpu", "CPU utilization of a node", {"share": _of_nodes(lambda node: node.cpu_percent / 100)}),
        Metric("ram", "host memory of a node that is not available",
               {"share": _of_nodes(lambda node: _ram_used(node) / max(1, node.ram_total_bytes)),
                "bytes": _of_nodes(_ram_used)}),
        Metric("swap", "swap used on a node", {"bytes": _of_nodes(lambda node: float(node.swap_used_bytes))}),
    )
}  # fmt: skip
"""By name."""
