"""The metric families of the Prometheus endpoint, each read from the state of a run.

Names follow Prometheus's conventions: base units (seconds, bytes, joules, ratios of 1) at the end of the name, `_total`
for counters. Every sample has the label `run`. Nothing that identifies files or people is among the labels: model names
that are paths are cut to their last part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from runtime.wire.messages import RunStateName, StepResult
from runtime.wire.node import GpuStats, NodeStats
from zerotop.alerts.metrics import newest_step, vram_bytes
from zerotop.state.condition import condition_of, silent_s
from zerotop.state.efficiency import rank_efficiency, run_efficiency
from zerotop.state.memory import memory_use
from zerotop.state.progress import progress
from zerotop.state.run import RankState, RunState

Sample = tuple[tuple[str, ...], float]
"""(values of the labels, value)"""


@dataclass(frozen=True)
class Family:
    """`name` without the prefix `zerotop_`, and of a counter without `_total`. `labels` beside `run`."""

    name: str
    description: str
    read: Callable[[RunState], Iterator[Sample]]
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"

    @property
    def sample_name(self) -> str:
        """As it stands on the page, and in queries."""
        return f"zerotop_{self.name}{'_total' if self.kind == 'counter' else ''}"


# ---- the run ---------------------------------------------------------------------------------------------------------
def _value(read: Callable[[RunState], float | None]) -> Callable[[RunState], Iterator[Sample]]:
    def reader(state: RunState) -> Iterator[Sample]:
        if (value := read(state)) is not None:
            yield (), float(value)

    return reader


def _step(read: Callable[[StepResult], float | None]) -> Callable[[RunState], Iterator[Sample]]:
    def of(state: RunState) -> float | None:
        step = newest_step(state)
        return read(step) if step is not None else None

    return _value(of)


def _info(state: RunState) -> Iterator[Sample]:
    hello = state.hello
    if hello is not None:
        model = PurePath(hello.model_name).name
        yield (model, str(hello.stage), hello.precision, str(hello.world_size), str(hello.global_batch)), 1.0


def _states(state: RunState) -> Iterator[Sample]:
    for name in get_args(RunStateName):
        yield (name,), float(state.state_name == name)


def _verdict(state: RunState) -> Iterator[Sample]:
    if state.verdict is not None:
        ranks = ",".join(map(str, state.verdict.ranks))
        yield (state.verdict.what, state.verdict.severity, ranks), 1.0


def _alerts(state: RunState) -> Iterator[Sample]:
    for alert in state.alerts.values():
        yield (alert.name, alert.severity), float(alert.state == "firing")


def _status(read: str) -> Callable[[RunState], Iterator[Sample]]:
    return _value(lambda state: getattr(state.status, read) if state.status is not None else None)


def _energy(state: RunState) -> float | None:
    use = state.energy_use()
    return use.joules_per_step if use is not None else None


def _eta(state: RunState) -> float | None:
    return progress(state).eta_s


def _step_seconds(state: RunState) -> float | None:
    taken = progress(state).step_ms
    return None if taken is None else taken / 1000


# ---- ranks -----------------------------------------------------------------------------------------------------------
def _ranks(read: Callable[[RankState], float | None]) -> Callable[[RunState], Iterator[Sample]]:
    def reader(state: RunState) -> Iterator[Sample]:
        for number, rank in sorted(state.ranks.items()):
            if (value := read(rank)) is not None:
                yield (str(number),), float(value)

    return reader


def _rank_step(read: Callable[[StepResult], float | None]) -> Callable[[RunState], Iterator[Sample]]:
    return _ranks(lambda rank: read(rank.step) if rank.step is not None else None)


def _silence(state: RunState) -> Iterator[Sample]:
    for number, rank in sorted(state.ranks.items()):
        if rank.heard_ns and rank.goodbye is None:
            yield (str(number),), silent_s(rank, state.hub_now_ns)


def _rank_mfu(state: RunState) -> Iterator[Sample]:
    for number, rank in sorted(state.ranks.items()):
        if (mfu := rank_efficiency(state, rank).mfu) is not None:
            yield (str(number),), mfu


def _vram(total: bool) -> Callable[[RunState], Iterator[Sample]]:
    def reader(state: RunState) -> Iterator[Sample]:
        for number, rank in sorted(state.ranks.items()):
            value = vram_bytes(state, rank)[int(total)]
            if value is not None:
                yield (str(number),), float(value)

    return reader


def _memory(state: RunState) -> Iterator[Sample]:
    for number, rank in sorted(state.ranks.items()):
        if rank.memory is not None:
            for category, size in memory_use(rank.memory).parts:
                yield (str(number), category), float(size)


def _phases(state: RunState) -> Iterator[Sample]:
    for number, rank in sorted(state.ranks.items()):
        yield (str(number), rank.phase), 1.0


def _packets_lost(state: RunState) -> Iterator[Sample]:
    for number, rank in sorted(state.ranks.items()):
        dropped = rank.heartbeat.dropped if rank.heartbeat is not None else 0
        yield (str(number),), float(rank.packets_lost + dropped)


# ---- GPUs and nodes --------------------------------------------------------------------------------------------------
_GPU_LABELS = ("host", "gpu", "rank")


def _gpus(read: Callable[[GpuStats], float | None], factor: float = 1.0) -> Callable[[RunState], Iterator[Sample]]:
    def reader(state: RunState) -> Iterator[Sample]:
        for host, node in sorted(state.nodes.items()):
            whose = {
                rank.hello.device_uuid.removeprefix("GPU-"): str(number)
                for number, rank in state.ranks.items()
                if rank.hello is not None and rank.hello.host == host and rank.hello.device_uuid
            }
            for gpu in node.gpus or ():
                if (value := read(gpu)) is not None:
                    yield (host, str(gpu.index), whose.get(gpu.uuid.removeprefix("GPU-"), "")), float(value) * factor

    return reader


def _nodes(read: Callable[[NodeStats], float | None]) -> Callable[[RunState], Iterator[Sample]]:
    def reader(state: RunState) -> Iterator[Sample]:
        for host, node in sorted(state.nodes.items()):
            if (value := read(node)) is not None:
                yield (host,), float(value)

    return reader


FAMILIES: tuple[Family, ...] = (
    Family("run_info", "What is trained: always 1.", _info,
           ("model", "stage", "precision", "world_size", "global_batch")),
    Family("run_state", "1 for the state that the run is in, 0 for the others.", _states, ("state",)),
    Family("run_stalled", "1 while no rank makes progress or one of them sends nothing.",
           _value(lambda state: float(condition_of(state).name == "stalled"))),
    Family("verdict", "The verdict on the run: always 1.", _verdict, ("what", "severity", "ranks")),
    Family("alert_firing", "1 while the alert fires. An alert whose rule has never held is not listed.", _alerts,
           ("alert", "severity")),
    Family("attempt", "Number of the attempt, from 1.", _status("attempt")),
    Family("restarts", "Automatic restarts since the launch.", _status("restarts"), kind="counter"),
    Family("start_time_seconds", "When the run was launched, Unix time.", _status("started_wall_s")),
    Family("last_checkpoint_step", "Step of the newest complete checkpoint.", _status("last_checkpoint_step")),
    Family("step", "Optimizer steps that all ranks have finished; falls back after a restart.",
           _value(lambda state: state.step)),
    Family("steps_planned", "Optimizer steps that the run will take.",
           _value(lambda state: state.hello.steps if state.hello is not None else None)),
    Family("eta_seconds", "Time to the last step at the present speed.", _value(_eta)),
    Family("loss", "Training loss of the newest step.", _step(lambda step: step.loss)),
    Family("evaluation_loss", "Loss of the newest evaluation.",
           _value(lambda state: state.evaluations.newest.loss if state.evaluations.newest is not None else None)),
    Family("learning_rate", "Learning rate of the newest step.", _step(lambda step: step.lr)),
    Family("gradient_norm", "Global gradient norm of the newest step.", _step(lambda step: step.grad_norm)),
    Family("loss_scale", "Loss scale of the newest step (fp16).", _step(lambda step: step.loss_scale)),
    Family("skipped_steps", "Optimizer steps skipped so far.", _step(lambda step: step.skipped_steps), kind="counter"),
    Family("step_duration_seconds", "Time of an optimizer step, median of the newest 20.", _value(_step_seconds)),
    Family("tokens_per_second", "Tokens per second of all ranks.", _value(lambda state: progress(state).tokens_per_s)),
    Family("mfu_ratio", "Model FLOPs utilization, mean over the ranks.",
           _value(lambda state: run_efficiency(state).mfu)),
    Family("energy_per_step_joules", "Energy of all GPUs per optimizer step.", _value(_energy)),
    Family("rank_step", "Newest optimizer step of the rank.", _rank_step(lambda step: step.step), ("rank",)),
    Family("rank_phase", "What the rank is doing: always 1.", _phases, ("rank", "phase")),
    Family("rank_step_duration_seconds", "Time of the rank's newest optimizer step.",
           _rank_step(lambda step: step.step_ms / 1000), ("rank",)),
    Family("rank_wait_seconds", "For how long the rank stood still for communication in its newest step.",
           _rank_step(lambda step: step.wait_ms / 1000), ("rank",)),
    Family("rank_communication_bytes", "Bytes that the rank sent and received in its newest step.",
           _ranks(lambda rank: rank.comm_bytes), ("rank",)),
    Family("rank_tokens_per_second", "Tokens per second of the rank.", _rank_step(lambda step: step.tokens_per_s),
           ("rank",)),
    Family("rank_mfu_ratio", "Model FLOPs utilization of the rank's device.", _rank_mfu, ("rank",)),
    Family("rank_silence_seconds", "Time since the hub has heard from the rank.", _silence, ("rank",)),
    Family("rank_messages_lost", "Telemetry of the rank that was dropped.", _packets_lost, ("rank",), "counter"),
    Family("rank_vram_used_bytes", "Memory used on the rank's GPU, by all processes.", _vram(False), ("rank",)),
    Family("rank_vram_total_bytes", "Memory of the rank's GPU.", _vram(True), ("rank",)),
    Family("rank_memory_bytes", "The rank's memory on its device by use.", _memory, ("rank", "category")),
    Family("rank_rss_bytes", "Host memory of the rank's process.",
           _ranks(lambda rank: rank.memory.rss_bytes if rank.memory is not None else None), ("rank",)),
    Family("rank_pinned_bytes", "Page-locked host memory of the rank.",
           _ranks(lambda rank: rank.memory.pinned_bytes if rank.memory is not None else None), ("rank",)),
    Family("gpu_utilization_ratio", "Share of the time in which a kernel ran.",
           _gpus(lambda gpu: gpu.utilization_percent, 0.01), _GPU_LABELS),
    Family("gpu_sm_activity_ratio", "Share of the SMs that were busy.",
           _gpus(lambda gpu: gpu.sm_activity_percent, 0.01), _GPU_LABELS),
    Family("gpu_tensor_activity_ratio", "Share of the time in which tensor cores were busy.",
           _gpus(lambda gpu: gpu.tensor_activity_percent, 0.01), _GPU_LABELS),
    Family("gpu_memory_used_bytes", "Memory used on the GPU.", _gpus(lambda gpu: gpu.used_bytes), _GPU_LABELS),
    Family("gpu_memory_total_bytes", "Memory of the GPU.", _gpus(lambda gpu: gpu.total_bytes), _GPU_LABELS),
    Family("gpu_power_watts", "Power.", _gpus(lambda gpu: gpu.power_w), _GPU_LABELS),
    Family("gpu_energy_joules", "Energy since the driver was loaded.", _gpus(lambda gpu: gpu.energy_j), _GPU_LABELS,
           "counter"),
    Family("gpu_temperature_celsius", "Temperature.", _gpus(lambda gpu: gpu.temperature_c), _GPU_LABELS),
    Family("gpu_sm_clock_hertz", "SM clock.", _gpus(lambda gpu: gpu.sm_clock_mhz, 1e6), _GPU_LABELS),
    Family("gpu_throttled", "1 while the clocks are held below their maximum for another reason than idleness.",
           _gpus(lambda gpu: None if gpu.lost else float(bool(gpu.clock_reasons))), _GPU_LABELS),
    Family("gpu_lost", "1 if the driver has lost the GPU.", _gpus(lambda gpu: float(gpu.lost)), _GPU_LABELS),
    Family("gpu_ecc_uncorrected_errors", "Uncorrected errors of its memory since the driver was loaded.",
           _gpus(lambda gpu: gpu.ecc_uncorrected), _GPU_LABELS, "counter"),
    Family("gpu_pcie_sent_bytes_per_second", "PCIe traffic from the GPU.", _gpus(lambda gpu: gpu.pcie_tx_bytes_per_s),
           _GPU_LABELS),
    Family("gpu_pcie_received_bytes_per_second", "PCIe traffic to the GPU.",
           _gpus(lambda gpu: gpu.pcie_rx_bytes_per_s), _GPU_LABELS),
    Family("gpu_nvlink_sent_bytes_per_second", "NVLink traffic from the GPU, all links.",
           _gpus(lambda gpu: gpu.nvlink_tx_bytes_per_s), _GPU_LABELS),
    Family("gpu_nvlink_received_bytes_per_second", "NVLink traffic to the GPU, all links.",
           _gpus(lambda gpu: gpu.nvlink_rx_bytes_per_s), _GPU_LABELS),
    Family("node_cpu_utilization_ratio", "CPU utilization of the node.", _nodes(lambda node: node.cpu_percent / 100),
           ("host",)),
    Family("node_load1", "Load of the last minute.", _nodes(lambda node: node.load_1m), ("host",)),
    Family("node_memory_used_bytes", "Host memory used.", _nodes(lambda node: node.ram_used_bytes), ("host",)),
    Family("node_memory_available_bytes", "Host memory that can be had without swapping.",
           _nodes(lambda node: node.ram_available_bytes), ("host",)),
    Family("node_memory_total_bytes", "Host memory.", _nodes(lambda node: node.ram_total_bytes), ("host",)),
    Family("node_swap_used_bytes", "Swap used.", _nodes(lambda node: node.swap_used_bytes), ("host",)),
    Family("node_run_rss_bytes", "Host memory of all processes of the run.", _nodes(lambda node: node.run_rss_bytes),
           ("host",)),
    Family("exporter_time_seconds", "When this page was made, Unix time.", _value(lambda state: time.time())),
)  # fmt: skip
