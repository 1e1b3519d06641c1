"""The host: CPU, memory, and the part of them that the run's processes use."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from runtime.wire.node import GpuStats, NodeStats
from zerotop.probe.memory import MemoryProbe
from zerotop.probe.processes import BusyProcesses, RunDelay, process_state

BUSY_FROM_PERCENT = 5.0
"""Who else uses the CPUs is looked up only while a rank waits for one for this share of its time."""
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


class HostProbe:
    """Call `sample` about once a second from one thread: CPU figures are the share since the previous call."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}
        self._root = psutil.Process()
        self._run_delay, self._busy = RunDelay(), BusyProcesses()
        self._memory = MemoryProbe()
        psutil.cpu_percent()

    def sample(self, rank_pids: Mapping[int, int], gpus: list[GpuStats] | None, gpu_note: str) -> NodeStats:
        """The NodeStats of this node. `rank_pids` is rank -> process id of its ranks; the figures of one that has
        ended are left out."""
        memory = psutil.virtual_memory()
        used, total = _container_memory(memory.total - memory.available, memory.total)
        rss, cpu = self._ranks(rank_pids)
        run_rss, own = self._run()
        run_delay = self._run_delay.sample(rank_pids)
        return NodeStats(
            host=socket.gethostname(),
            cpu_percent=psutil.cpu_percent(),
            cpu_count=psutil.cpu_count() or 1,
            load_1m=os.getloadavg()[0],
            ram_used_bytes=used,
            ram_total_bytes=total,
            **self._memory.sample(),
            swap_used_bytes=_swap_used(),
            rank_rss_bytes=rss,
            rank_cpu_percent=cpu,
            rank_process={rank: state for rank, pid in rank_pids.items() if (state := process_state(pid))},
            rank_run_delay_percent=run_delay,
            busy=self._busy.sample(own) if max(run_delay.values(), default=0.0) >= BUSY_FROM_PERCENT else [],
            run_rss_bytes=run_rss,
            gpus=gpus,
            gpu_note=gpu_note,
            at_ns=time.monotonic_ns(),
            wall_s=time.time(),
        )

    def _ranks(self, pids: Mapping[int, int]) -> tuple[dict[int, int], dict[int, float]]:
        rss: dict[int, int] = {}
        cpu: dict[int, float] = {}
        for rank, pid in pids.items():
            try:
                process = self._processes.get(rank)
                if process is None or process.pid != pid:
                    process = self._processes[rank] = psutil.Process(pid)
                with process.oneshot():
                    rss[rank] = process.memory_info().rss
                    cpu[rank] = process.cpu_percent()
            except psutil.Error:
                self._processes.pop(rank, None)
                rss.pop(rank, None)
        return rss, cpu

    def _run(self) -> tuple[int, set[int]]:
        """The RSS of all processes of the run on this node, and their process ids."""
        total, pids = 0, set()
        for process in [self._root, *self._root.children(recursive=True)]:
            pids.add(process.pid)
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        return total, pids


def _swap_used() -> int:
    try:
        return int(psutil.swap_memory().used)
    except (OSError, RuntimeError):  # no /proc/swaps in some containers
        return 0


def _container_memory(used: int, total: int) -> tuple[int, int]:
    """Figures of the host, or of the cgroup if its limit is lower: that is the limit at which the OOM killer acts."""
    try:
        group = _CGROUP / _OWN_CGROUP.read_text().split("::", 1)[1].strip().lstrip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit == "max" or int(limit) >= total:
            return used, total
        current = int((group / "memory.current").read_text())
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, current - int(counters.get("inactive_file", 0))), int(limit)
    except (OSError, IndexError, ValueError):
        return used, total
