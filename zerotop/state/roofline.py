"""Which ceiling a rank is at: compute, device memory, PCIe, network or host.

The roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009) asks whether arithmetic or memory traffic bounds a
kernel. Here it is applied to the whole step: what takes the step's time outside of the device's kernels binds if it
takes a quarter of the step or more; otherwise the device itself does, and its counters say which part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.wire.node import GpuStats
from zerotop.format import bytes_text, ms_text
from zerotop.state.breakdown import PARTS, Breakdown
from zerotop.state.efficiency import rank_efficiency
from zerotop.state.memory import gpu_of
from zerotop.state.run import RankState, RunState

CeilingName = Literal["compute", "device memory", "PCIe", "network", "host", "peers", "unknown"]
BINDING_SHARE = 0.25
"""Share of the step from which on something outside of the kernels binds."""
COMPUTE_MFU = 0.3
"""MFU from which on compute binds: dense transformers reach 0.35 to 0.6 on GPUs."""
MEMORY_ACTIVE = 0.6
"""Share of the time in which the device's memory interface is active, from which on it binds: about 0.9 is its
practical limit."""
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""What a PCIe lane carries in one direction, by generation (PCI-SIG)."""


@dataclass(frozen=True)
class Measured:
    """What is known of one rank's recent steps. Shares are 0..1, of the step unless another whole is named."""

    step_ms: float
    data: float = 0.0
    """Time outside of the engine: the data loader, and what else the script does."""
    offload: float = 0.0
    """Waiting for copies between host and device, and for updates of offloaded states."""
    transfer: float = 0.0
    """Exposed communication, without waiting for ranks that came later."""
    waiting: float = 0.0
    """Waiting for ranks that came later."""
    on_gpu: bool = True
    mfu: float | None = None
    bus_bytes_per_s: float | None = None
    """Bus bandwidth of the collectives."""
    pcie: float | None = None
    """PCIe traffic, as a share of what the link can carry."""
    memory_active: float | None = None
    """Share of the time in which the device's memory interface was active (GPM, DCGM)."""

    @property
    def outside(self) -> float:
        """Everything that is not the device's own work."""
        return self.data + self.offload + self.transfer + self.waiting


@dataclass(frozen=True)
class Ceiling:
    """What binds, and one sentence with the figures. "peers": another rank is slower, and its ceiling is the run's.
    "unknown": no ceiling is reached."""

    name: CeilingName
    text: str


def ceiling_of(measured: Measured) -> Ceiling | None:
    """The binding ceiling; None before a step is known."""
    if measured.step_ms <= 0:
        return None
    shares = {
        "data": measured.data,
        "offload": measured.offload,
        "transfer": measured.transfer,
        "waiting": measured.waiting,
    }
    largest = max(shares, key=lambda name: shares[name])
    share = shares[largest]
    if share < BINDING_SHARE:
        return _on_device(measured)
    took = f"{share:.0%} of the step ({ms_text(share * measured.step_ms)})"
    match largest:
        case "data":
            return Ceiling("host", f"host: {took} passes outside of the engine, mostly for data")
        case "transfer":
            speed = measured.bus_bytes_per_s
            at = f", which run at {bytes_text(speed)}/s of bus bandwidth" if speed else ""
            return Ceiling("network", f"network: {took} waits for transfers of collectives{at}")
        case "waiting":
            return Ceiling("peers", f"other ranks: {took} waits for ranks that come later; their ceiling is the run's")
    if measured.on_gpu and (measured.pcie is None or measured.pcie >= 0.5):
        busy = "" if measured.pcie is None else f"; the link is {measured.pcie:.0%} busy"
        return Ceiling("PCIe", f"PCIe: {took} waits for offloaded states and their copies{busy}")
    busy = "" if measured.pcie is None else f", and PCIe is only {measured.pcie:.0%} busy"
    return Ceiling("host", f"host: {took} waits for updates of offloaded states on the CPU{busy}")


def _on_device(measured: Measured) -> Ceiling:
    """The ceiling of a step that is mostly the device's own work."""
    own = f"{max(0.0, 1 - measured.outside):.0%} of the step is the device's own work"
    mfu, active = measured.mfu, measured.memory_active
    if active is not None and active >= MEMORY_ACTIVE and (mfu is None or mfu < active):
        at = "" if mfu is None else f" at {mfu:.1%} MFU"
        return Ceiling("device memory", f"device memory: {own}, and its memory is active {active:.0%} of the time{at}")
    if mfu is not None and mfu >= COMPUTE_MFU:
        return Ceiling("compute", f"compute: {own}, at {mfu:.1%} MFU")
    if not measured.on_gpu:
        return Ceiling("compute", f"compute: {own}, on a CPU" + ("" if mfu is None else f" at {mfu:.1%} MFU"))
    if mfu is None:
        return Ceiling("unknown", f"compute or device memory: {own}; without MFU they can't be told apart")
    return Ceiling(
        "unknown",
        f"no ceiling is reached: {own}, at {mfu:.1%} MFU; small kernels or slow launches (zerotop profile shows them)",
    )


def measured_ranks(state: RunState) -> dict[int, Measured]:
    """What the state knows of each rank's recent steps; ranks before their first step are left out.

    A screen or command that has just come has seen no collectives, without which waiting is not told from transfer, and
    of most ranks one step: until it has seen as much as the hub, the hub's report is used.
    """
    window, report = state.waits.window(), state.time_report
    known, bus = state.breakdowns.recent(window.waited_ms), state.waits.bus_bytes_per_s(state.world_size)
    if report is not None:
        if window.steps < report.steps or min(map(state.breakdowns.steps, known), default=0) < report.steps:
            known |= {
                rank: Breakdown(**{part: ms.get(part, 0.0) for part in PARTS}) for rank, ms in report.parts_ms.items()
            }
        if len(state.waits.meetings) < report.meetings:
            bus = report.bus_bytes_per_s
    return {
        number: _measured(state, state.ranks[number], breakdown, bus)
        for number, breakdown in known.items()
        if number in state.ranks and breakdown.step_ms > 0
    }


def _measured(state: RunState, rank: RankState, breakdown: Breakdown, bus_bytes_per_s: float | None) -> Measured:
    gpu = gpu_of(state, rank)
    active = gpu.dram_activity_percent if gpu is not None else None
    return Measured(
        step_ms=breakdown.step_ms,
        data=breakdown.share("data"),
        offload=breakdown.share("offload"),
        transfer=breakdown.share("transfer"),
        waiting=breakdown.share("waiting"),
        on_gpu=rank.hello is not None and rank.hello.device.startswith("cuda"),
        mfu=rank_efficiency(state, rank).mfu,
        bus_bytes_per_s=bus_bytes_per_s,
        pcie=_pcie_share(gpu) if gpu is not None else None,
        memory_active=None if active is None else active / 100,
    )


def rank_ceiling(state: RunState, number: int) -> Ceiling | None:
    """The binding ceiling of one rank; None before its first step."""
    measured = measured_ranks(state).get(number)
    return None if measured is None else ceiling_of(measured)


def run_ceiling(state: RunState) -> Ceiling | None:
    """The binding ceiling of the run: that of the rank which waits least for others, since the others wait for it."""
    known = measured_ranks(state)
    if not known:
        return None
    return ceiling_of(min(known.values(), key=lambda measured: measured.waiting))


def _pcie_share(gpu: GpuStats) -> float | None:
    """The busier direction of the PCIe link, as a share of what the link carries."""
    lane = _LANE_BYTES_PER_S.get(gpu.pcie_generation or 0)
    rates = [rate for rate in (gpu.pcie_tx_bytes_per_s, gpu.pcie_rx_bytes_per_s) if rate is not None]
    return max(rates) / (lane * gpu.pcie_width) if lane and gpu.pcie_width and rates else None
