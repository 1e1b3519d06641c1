"""The fields of a GPU that may be slow to read, in groups that are read together, each with a time to live.

[Note: what the groups cost]
`nvmlDeviceGetPcieThroughput` measures for 20 ms per call and direction, so the PCIe rates are differences of the
byte counters. Those have no fixed width ("value can be wrapped"); where they cannot tell a rate, GPM's figure is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from zerotop.probe.counters import CounterRate, pcie_bytes_per_s
from zerotop.probe.device import Device, percent

_MIB = 2**20
_KIB = 2**10
_ALL_LINKS = 2**32 - 1
_MAX_NVLINKS = 36
_SAMPLE_FIELDS = {
    "sm_activity_percent": ("NVML_GPM_METRIC_SM_UTIL", 1),
    "tensor_activity_percent": ("NVML_GPM_METRIC_ANY_TENSOR_UTIL", 1),
    "dram_activity_percent": ("NVML_GPM_METRIC_DRAM_BW_UTIL", 1),
    "pcie_tx_bytes_per_s": ("NVML_GPM_METRIC_PCIE_TX_PER_SEC", _MIB),
    "pcie_rx_bytes_per_s": ("NVML_GPM_METRIC_PCIE_RX_PER_SEC", _MIB),
    "nvlink_tx_bytes_per_s": ("NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC", _MIB),
    "nvlink_rx_bytes_per_s": ("NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC", _MIB),
}
"""Field -> GPM's metric and its unit."""
_COUNTERS = {
    "pcie_tx_bytes_per_s": ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", 1),
    "pcie_rx_bytes_per_s": ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", 1),
    "nvlink_tx_bytes_per_s": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", _KIB),
    "nvlink_rx_bytes_per_s": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", _KIB),
}
"""Field -> NVML's counter and its unit."""
_ASKED_TOGETHER = {
    "sm_activity_percent": ("tensor_activity_percent", "dram_activity_percent"),
    "pcie_tx_bytes_per_s": tuple(_COUNTERS),
}
"""The field under which NVML is asked -> what comes with it."""
_LINK_WORDS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""NVML's level of the common ancestor of two GPUs -> the word of `nvidia-smi topo -m`."""


class Reader:
    """Reads the slow fields of one device. Keeps what differences need: the counters and GPM's last sample."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._rates = {field: CounterRate() for field in _COUNTERS}
        self._most_per_s = math.inf
        self._gpm: bool | None = None
        self._samples: list[Any] = []
        self._sampled = False
        self._metrics: Any = None

    def close(self) -> None:
        """Free GPM's samples."""
        for sample in self._samples:
            self.device.ask("sm_activity_percent", "nvmlGpmSampleFree", sample)
        self._samples = []

    # ---- traffic and activity --------------------------------------------------------------------------------------
    def traffic(self) -> dict[str, Any]:
        """Activity by GPM, and the traffic over PCIe and NVLink, since the last call."""
        found = self._activity()
        for field, rate in self._counter_rates().items():
            if rate is not None:
                found[field] = rate
        for asked, fields in _ASKED_TOGETHER.items():
            if asked in self.device.denied:
                self.device.denied.update(fields)
        return {
            field: value if value is None else round(value, 1 if "percent" in field else None)
            for field, value in found.items()
        }

    def _counter_rates(self) -> dict[str, float | None]:
        nvml = self.device.nvml
        wanted: dict[str, tuple[Any, int]] = {}
        for field, (name, unit) in _COUNTERS.items():
            number = getattr(nvml, name, None)
            if number is not None and not self.device.refused(field, name):
                wanted[field] = ((number, 0 if field.startswith("pcie") else _ALL_LINKS), unit)
        if not wanted:
            return {}
        values = self.device.ask(
            "pcie_tx_bytes_per_s", "nvmlDeviceGetFieldValues", self.device.handle, [key for key, _ in wanted.values()]
        )
        if values is None:
            return {}
        rates: dict[str, float | None] = {}
        for (field, (_, unit)), value in zip(wanted.items(), values, strict=True):
            if value.nvmlReturn != 0:
                self.device.note_error(field, _COUNTERS[field][0], value.nvmlReturn)
                continue
            narrow = value.valueType == getattr(nvml, "NVML_VALUE_TYPE_UNSIGNED_INT", 1)
            count = value.value.uiVal if narrow else value.value.ullVal
            # The driver may answer with a reading of some time ago: its own stamp tells.
            at_s = value.timestamp / 1e6 if value.timestamp > 0 else time.monotonic()
            most = (self._most_per_s if field.startswith("pcie") else math.inf) / unit
            rate = self._rates[field].add(int(count), at_s, narrow=narrow, most_per_s=most)
            rates[field] = None if rate is None else rate * unit
        return rates

    def _activity(self) -> dict[str, float | None]:
        device, nvml = self.device, self.device.nvml
        if self._gpm is None:
            support = device.ask("sm_activity_percent", "nvmlGpmQueryDeviceSupport", device.handle)
            if support is None and not device.refused("sm_activity_percent", "nvmlGpmQueryDeviceSupport"):
                return {}
            self._gpm = bool(support and support.isSupportedDevice)
        if not self._gpm:
            return {}
        while len(self._samples) < 2:
            sample = device.ask("sm_activity_percent", "nvmlGpmSampleAlloc")
            if sample is None:
                return {}
            self._samples.append(sample)
        if device.ask("sm_activity_percent", "nvmlGpmSampleGet", device.handle, self._samples[1]) is None:
            return {}
        self._samples.reverse()
        if not self._sampled:
            self._sampled = True
            return {}
        wanted = {field: unit for field, (name, unit) in _SAMPLE_FIELDS.items() if hasattr(nvml, name)}
        metrics = self._metrics = self._metrics or nvml.c_nvmlGpmMetricsGet_t()
        metrics.version, metrics.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(wanted)
        metrics.sample1, metrics.sample2 = self._samples[1], self._samples[0]
        for place, field in enumerate(wanted):
            metrics.metrics[place].metricId = getattr(nvml, _SAMPLE_FIELDS[field][0])
        if device.ask("sm_activity_percent", "nvmlGpmMetricsGet", metrics) is None:
            return {}
        found: dict[str, float | None] = {}
        for place, (field, unit) in enumerate(wanted.items()):
            metric = metrics.metrics[place]
            if metric.nvmlReturn == 0 and math.isfinite(metric.value) and metric.value >= 0:
                found[field] = percent(metric.value) if unit == 1 else metric.value * unit
        return found

    # ---- what seldom changes ---------------------------------------------------------------------------------------
    def pcie(self) -> dict[str, Any]:
        """Generation and width of the PCIe link."""
        device, handle = self.device, self.device.handle
        found = {
            "pcie_generation": device.count("pcie_generation", "nvmlDeviceGetCurrPcieLinkGeneration", handle),
            "max_pcie_generation": device.count("max_pcie_generation", "nvmlDeviceGetMaxPcieLinkGeneration", handle),
            "pcie_width": device.count("pcie_width", "nvmlDeviceGetCurrPcieLinkWidth", handle),
            "max_pcie_width": device.count("max_pcie_width", "nvmlDeviceGetMaxPcieLinkWidth", handle),
        }
        self._most_per_s = pcie_bytes_per_s(found["max_pcie_generation"], found["max_pcie_width"])
        return found

    def ecc(self) -> dict[str, Any]:
        """ECC errors since the driver was loaded, and rows of memory that were replaced by spare ones."""
        device, handle, nvml = self.device, self.device.handle, self.device.nvml
        volatile = getattr(nvml, "NVML_VOLATILE_ECC", 0)
        found: dict[str, Any] = {
            field: device.count(field, "nvmlDeviceGetTotalEccErrors", handle, kind, volatile)
            for field, kind in (("ecc_corrected", 0), ("ecc_uncorrected", 1))
        }
        rows = device.ask("remapped_rows", "nvmlDeviceGetRemappedRows", handle)
        if rows is not None:
            corrected, uncorrected, pending, failed = rows
            found |= {
                "remapped_rows": corrected + uncorrected,
                "row_remap_pending": bool(pending),
                "row_remap_failed": bool(failed),
            }
        return found

    def limits(self) -> dict[str, Any]:
        """The highest clocks, the temperature at which the GPU slows down, and whether it is partitioned (MIG)."""
        device, handle, nvml = self.device, self.device.handle, self.device.nvml
        slowdown = getattr(nvml, "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", 1)
        mig = device.ask("mig", "nvmlDeviceGetMigMode", handle)
        return {
            "max_sm_clock_mhz": device.number("max_sm_clock_mhz", "nvmlDeviceGetMaxClockInfo", handle, 1),
            "max_memory_clock_mhz": device.number("max_memory_clock_mhz", "nvmlDeviceGetMaxClockInfo", handle, 2),
            "slowdown_temperature_c": device.number(
                "slowdown_temperature_c", "nvmlDeviceGetTemperatureThreshold", handle, slowdown
            ),
            "mig": bool(mig[0]) if mig else None,
        }

    def links(self, others: list[Device]) -> dict[str, Any]:
        """How this GPU reaches each GPU of the node, in the words of `nvidia-smi topo -m`."""
        device = self.device
        ends = self._nvlink_ends()
        words = []
        for other in others:
            if other.index == device.index:
                words.append("X")
            elif other.handle is None:
                words.append("")
            elif count := ends.get("switch", 0) or ends.get(_bus_id(other), 0):
                words.append(f"NV{count}")
            else:
                level = device.ask("links", "nvmlDeviceGetTopologyCommonAncestor", device.handle, other.handle)
                words.append(_LINK_WORDS.get(level, "") if level is not None else "")
        return {"links": words if any(word not in ("", "X") for word in words) else None}

    def _nvlink_ends(self) -> dict[str, int]:
        """Active NVLinks by where they lead: "switch", or the PCI bus id of the GPU at the other end."""
        device, ends = self.device, dict[str, int]()
        for link in range(_MAX_NVLINKS):
            active = device.ask("links", "nvmlDeviceGetNvLinkState", device.handle, link, remember=link == 0)
            if active is None:
                break  # no NVLink, or no more of them
            if not active:
                continue
            kind = device.ask("links", "nvmlDeviceGetNvLinkRemoteDeviceType", device.handle, link)
            remote = device.ask("links", "nvmlDeviceGetNvLinkRemotePciInfo", device.handle, link) if kind == 0 else None
            where = "switch" if kind == 2 else _id_text(remote)
            if where:
                ends[where] = ends.get(where, 0) + 1
        return ends


def _bus_id(device: Device) -> str:
    return _id_text(device.ask("links", "nvmlDeviceGetPciInfo", device.handle))


def _id_text(pci: Any) -> str:
    raw = getattr(pci, "busId", "") if pci is not None else ""
    return raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)


class Group(NamedTuple):
    """Fields that are read together every `ttl_s` seconds."""

    name: str
    ttl_s: float
    read: Callable[[Reader, list[Device]], dict[str, Any]]
    fields: tuple[str, ...]


GROUPS = (
    Group("traffic", 1.0, lambda reader, _: reader.traffic(), tuple(_SAMPLE_FIELDS)),
    Group(
        "pcie",
        5.0,
        lambda reader, _: reader.pcie(),
        ("pcie_generation", "max_pcie_generation", "pcie_width", "max_pcie_width"),
    ),
    Group(
        "ecc",
        10.0,
        lambda reader, _: reader.ecc(),
        ("ecc_corrected", "ecc_uncorrected", "remapped_rows", "row_remap_pending", "row_remap_failed"),
    ),
    Group(
        "limits",
        60.0,
        lambda reader, _: reader.limits(),
        ("max_sm_clock_mhz", "max_memory_clock_mhz", "slowdown_temperature_c", "mig"),
    ),
    Group("links", 300.0, lambda reader, devices: reader.links(devices), ("links",)),
)
