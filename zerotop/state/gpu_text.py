"""The facts of a GPU in words, for the rank screen and `zerotop doctor`."""

from __future__ import annotations

from collections import Counter

from runtime.wire.node import GpuStats
from zerotop.format import MISSING, byte_rate_text, duration_text

_LABELS = {
    "utilization_percent": "util",
    "sm_activity_percent": "SM",
    "tensor_activity_percent": "tensor",
    "dram_activity_percent": "DRAM",
    "power_w": "power",
    "power_limit_w": "power cap",
    "energy_j": "energy",
    "sm_clock_mhz": "SM clock",
    "max_sm_clock_mhz": "SM clock's maximum",
    "memory_clock_mhz": "memory clock",
    "max_memory_clock_mhz": "memory clock's maximum",
    "clock_reasons": "clock limits",
    "temperature_c": "temp",
    "slowdown_temperature_c": "slowdown temp",
    "used_bytes": "memory",
    "total_bytes": "memory",
    "mig": "MIG",
    "links": "links",
}


def gpu_items(gpu: GpuStats) -> list[tuple[str, str]]:
    """(label, value) of the facts, the most telling first. The first four are always there, n/a if need be."""
    items = [
        ("util", _percent(gpu.utilization_percent)),
        ("SM", _percent(gpu.sm_activity_percent)),
        ("power", _of(gpu.power_w, gpu.power_limit_w, "W")),
        ("SM clock", _of(gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, "MHz")),
    ]
    if gpu.clock_reasons:
        items.append(("limited by", ", ".join(gpu.clock_reasons)))
    if gpu.temperature_c is not None:
        items.append(("temp", _of(gpu.temperature_c, gpu.slowdown_temperature_c, "°C")))
    for label, share in (("tensor", gpu.tensor_activity_percent), ("DRAM", gpu.dram_activity_percent)):
        if share is not None:
            items.append((label, _percent(share)))
    for label, out, into in (
        ("PCIe", gpu.pcie_tx_bytes_per_s, gpu.pcie_rx_bytes_per_s),
        ("NVLink", gpu.nvlink_tx_bytes_per_s, gpu.nvlink_rx_bytes_per_s),
    ):
        if out is not None and into is not None:
            items.append((label, f"out {byte_rate_text(out)} in {byte_rate_text(into)}"))
    if gpu.pcie_generation is not None and gpu.pcie_width is not None:
        items.append(("PCIe link", f"gen {gpu.pcie_generation} x{gpu.pcie_width}"))
    if gpu.links:
        items.append(("peers", _links(gpu.links)))
    if gpu.ecc_uncorrected is not None:
        corrected = f", {gpu.ecc_corrected:,} corrected" if gpu.ecc_corrected else ""
        items.append(("ECC errors", f"{gpu.ecc_uncorrected:,}{corrected}"))
    if gpu.remapped_rows:
        items.append(("remapped rows", f"{gpu.remapped_rows:,}"))
    if gpu.memory_clock_mhz is not None:
        items.append(("memory clock", _of(gpu.memory_clock_mhz, gpu.max_memory_clock_mhz, "MHz")))
    if gpu.mig:
        items.append(("", "partitioned (MIG)"))
    return items


def missing_text(gpu: GpuStats) -> str:
    """What is n/a for another reason than that the GPU does not have it; empty if there is nothing."""
    parts = []
    if gpu.stale_fields:  # a call has not come back from the driver
        parts.append(f"{MISSING} since {duration_text(gpu.stale_s)}: {_named(gpu.stale_fields)}")
    if gpu.no_permission:
        parts.append(f"no permission: {_named(gpu.no_permission)}")
    return "; ".join(parts)


def _named(fields: list[str]) -> str:
    names = (_LABELS.get(field) or _family(field) for field in fields)
    return ", ".join(dict.fromkeys(names))


def _family(field: str) -> str:
    for prefix, label in (
        ("pcie", "PCIe"),
        ("max_pcie", "PCIe"),
        ("nvlink", "NVLink"),
        ("ecc", "ECC errors"),
        ("remapped", "remapped rows"),
        ("row_remap", "remapped rows"),
    ):
        if field.startswith(prefix):
            return label
    return field


def _links(links: list[str]) -> str:
    """NV18 to 7, or NV4 to 1, NODE to 2, SYS to 4."""
    counts = Counter(word or MISSING for word in links if word != "X")
    return ", ".join(f"{word} to {count}" for word, count in counts.items())


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}%"


def _of(value: float | None, limit: float | None, unit: str) -> str:
    if value is None:
        return MISSING
    return f"{value:.0f} {unit}" if limit is None else f"{value:.0f}/{limit:.0f} {unit}"
