"""What the driver says of the GPU of each rank, and what of it is out of order.

Ranks are matched with GPUs by UUID (`gpu_of`), never by process id.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from runtime.wire.node import GpuStats
from zerotop.state.run import RunState

SLOWER_SHARE = 0.9
"""A power cap is out of order only if the SM clock is below this share of the median of the run's GPUs: large
GPUs under full load are at their cap all the time."""
BUSY_PERCENT = 10.0
"""From this utilisation on, the PCIe link must run at its full generation; an idle GPU lowers it to save power."""
_HOT = ("hot (software)", "hot (hardware)", "hardware slowdown", "power brake")


@dataclass(frozen=True)
class Concern:
    """Something about a GPU that is out of order."""

    word: str
    """For a cell of a table, at most 14 characters."""
    text: str
    """What it is, with figures, and what to do; the GPU is not named."""
    severity: Literal["warning", "error"]


def concerns(state: RunState) -> dict[int, tuple[Concern, ...]]:
    """Rank -> what is out of order about its GPU, the worst first. Ranks without any are left out."""
    # As `gpu_of`, with one pass over the GPUs of each node: this is asked at every tick, for all ranks.
    known = {
        (host, gpu.uuid.removeprefix("GPU-")): gpu for host, node in state.nodes.items() for gpu in node.gpus or ()
    }
    hellos = {number: rank.hello for number, rank in state.ranks.items() if rank.hello and rank.hello.device_uuid}
    found_at = {number: known.get((it.host, it.device_uuid.removeprefix("GPU-"))) for number, it in hellos.items()}
    gpus = {number: gpu for number, gpu in found_at.items() if gpu is not None}
    clocks: dict[str, list[float]] = {}
    for gpu in gpus.values():
        if gpu.sm_clock_mhz is not None:
            clocks.setdefault(gpu.name, []).append(gpu.sm_clock_mhz)
    typical = {name: statistics.median(all_of_them) for name, all_of_them in clocks.items() if len(all_of_them) > 1}
    found = {number: gpu_concerns(gpu, typical.get(gpu.name), hellos[number].wall_s) for number, gpu in gpus.items()}
    return {number: those for number, those in found.items() if those}


def gpu_concerns(gpu: GpuStats, typical_mhz: float | None = None, since_wall_s: float = 0.0) -> tuple[Concern, ...]:
    """What is out of order about one GPU, the worst first. `typical_mhz`: the median SM clock of the GPUs of this
    model that do the same work; None if there is no other. `since_wall_s`: when its rank began; an error before that
    has not kept the rank from running."""
    xids = [Concern(f"XID {gpu.xid}", gpu.xid_text, "error")] if gpu.xid and gpu.xid_wall_s >= since_wall_s else []
    if gpu.lost:
        return (Concern("lost", "the driver has lost it: reboot; check power, cooling, seating", "error"), *xids)
    return (*xids, *_silence(gpu), *_memory_errors(gpu), *_throttling(gpu, typical_mhz), *_pcie(gpu))


def _silence(gpu: GpuStats) -> list[Concern]:
    """The GPU does not even answer what is quick to read."""
    if "power_w" not in gpu.stale_fields:
        return []
    text = "the driver gives no answer about it: its next XID or dmesg may tell why; if it stays so, reboot"
    return [Concern("no answer", text, "warning")]


def _memory_errors(gpu: GpuStats) -> list[Concern]:
    found = []
    if gpu.ecc_uncorrected:
        count = f"{gpu.ecc_uncorrected:,} ECC error{'s' * (gpu.ecc_uncorrected > 1)}"
        text = f"{count} of its memory could not be corrected since the driver was loaded: reset the GPU"
        found.append(Concern("ECC errors", text, "error"))
    if gpu.row_remap_failed:
        text = "a bad row of its memory could not be replaced: take the GPU out of use"
        found.append(Concern("bad memory", text, "error"))
    elif gpu.row_remap_pending:
        text = "a bad row of its memory is replaced at the next reset: reset the GPU when it is free"
        found.append(Concern("reset pending", text, "warning"))
    return found


def _throttling(gpu: GpuStats, typical_mhz: float | None) -> list[Concern]:
    at = f"SM clock {_of(gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, 'MHz')}"
    if reasons := [reason for reason in _HOT if reason in gpu.clock_reasons]:
        heat = _of(gpu.temperature_c, None, "°C")
        if gpu.slowdown_temperature_c is not None:
            heat += f" (slows down at {gpu.slowdown_temperature_c:.0f} °C)"
        braked = set(reasons) <= {"power brake"}
        why = "the power supply asks for it" if braked else f"{heat}: check cooling and airflow"
        word = "power brake" if braked else "hot" if any("hot" in reason for reason in reasons) else "slowed down"
        return [Concern(word, f"throttled, {at}, {', '.join(reasons)}; {why}", "warning")]
    slower = gpu.sm_clock_mhz and typical_mhz and gpu.sm_clock_mhz < SLOWER_SHARE * typical_mhz
    if "power cap" in gpu.clock_reasons and slower:
        power = _of(gpu.power_w, gpu.power_limit_w, "W")
        text = (
            f"throttled, {at}, the median GPU's {typical_mhz:,.0f} MHz: power cap ({power}); compare the power limits"
        )
        return [Concern("power cap", text, "warning")]
    return []


def _pcie(gpu: GpuStats) -> list[Concern]:
    if gpu.pcie_width and gpu.max_pcie_width and gpu.pcie_width < gpu.max_pcie_width:
        text = f"its PCIe link has {gpu.pcie_width} of {gpu.max_pcie_width} lanes: reseat the card or its riser"
        return [Concern(f"PCIe x{gpu.pcie_width}", text, "warning")]
    busy = (gpu.utilization_percent or 0.0) >= BUSY_PERCENT
    if busy and gpu.pcie_generation and gpu.max_pcie_generation and gpu.pcie_generation < gpu.max_pcie_generation:
        text = f"its PCIe link runs at generation {gpu.pcie_generation} of {gpu.max_pcie_generation} under load: "
        return [Concern(f"PCIe gen {gpu.pcie_generation}", text + "check the slot, the riser and the BIOS", "warning")]
    return []


def _of(value: float | None, limit: float | None, unit: str) -> str:
    if value is None:
        return f"n/a {unit}"
    return f"{value:,.0f} {unit}" if limit is None else f"{value:,.0f} of {limit:,.0f} {unit}"
