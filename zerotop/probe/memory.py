"""The memory of a node as the kernel counts it: what is free, what is cached, and signs that it runs short. Every
figure is None where the kernel has none (macOS, old kernels, some containers)."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.host.memory_limits import read_limits
from runtime.process import cgroup

PAGE_BYTES = mmap.PAGESIZE
"""Unit of pswpin and pswpout in /proc/vmstat."""


class MemoryProbe:
    """Call `sample` about once a second: rates are since the previous call."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        """root: where /proc and /sys are, for tests."""
        self._root, self._clock = root, clock
        self._before: tuple[float, int, int] | None = None

    def sample(self) -> dict[str, Any]:
        """The fields of `NodeStats` that this probe knows."""
        meminfo = _table(cgroup.read(self._root / "proc/meminfo"), 1024)
        limits = read_limits(self._root)
        limited = not math.isinf(limits.group_limit_bytes)
        left = min(limits.available_bytes, limits.group_left_bytes)
        shared = meminfo.get("Shmem")
        cached = meminfo.get("Cached")
        return {
            "ram_available_bytes": None if math.isinf(left) else int(left),
            "cgroup_limit_bytes": int(limits.group_limit_bytes) if limited else None,
            "cgroup_used_bytes": int(limits.group_limit_bytes - limits.group_left_bytes) if limited else None,
            "shared_memory_bytes": shared,
            # The kernel counts shared memory among what is cached, though it can't be dropped.
            "page_cache_bytes": None if cached is None else max(0, cached - (shared or 0)),
            "memory_pressure_percent": self._pressure(),
            **self._swap_rates(),
        }

    def _pressure(self) -> float | None:
        """Of the machine or of this process's control groups (version 2), whichever is higher: in a container with a
        memory limit the machine may have plenty."""
        files = [self._root / "proc/pressure/memory"]
        files += [folder / "memory.pressure" for folder in cgroup.folders("", self._root)]
        found = [value for file in files if (value := _some_avg10(cgroup.read(file))) is not None]
        return max(found, default=None)

    def _swap_rates(self) -> dict[str, float | None]:
        counters = _table(cgroup.read(self._root / "proc/vmstat"), 1)
        if "pswpin" not in counters or "pswpout" not in counters:
            return {"swap_in_bytes_per_s": None, "swap_out_bytes_per_s": None}
        now = (self._clock(), counters["pswpin"], counters["pswpout"])
        before, self._before = self._before, now
        if before is None or now[0] <= before[0]:
            return {"swap_in_bytes_per_s": None, "swap_out_bytes_per_s": None}
        scale = PAGE_BYTES / (now[0] - before[0])
        return {
            "swap_in_bytes_per_s": max(0, now[1] - before[1]) * scale,
            "swap_out_bytes_per_s": max(0, now[2] - before[2]) * scale,
        }


def _table(text: str, unit: int) -> dict[str, int]:
    """Lines "KEY[:] NUMBER ..." as numbers, times `unit`."""
    found = {}
    for line in text.splitlines():
        fields = line.replace(":", " ").split()
        if len(fields) >= 2 and fields[1].isdigit():
            found[fields[0]] = int(fields[1]) * unit
    return found


def _some_avg10(text: str) -> float | None:
    """The figure `some avg10` of a PSI file."""
    for line in text.splitlines():
        if line.startswith("some "):
            for field in line.split()[1:]:
                name, _, value = field.partition("=")
                if name == "avg10":
                    return float(value)
    return None
