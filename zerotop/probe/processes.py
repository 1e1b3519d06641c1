"""What the kernel says of the ranks' processes, and who else uses the node's CPUs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from runtime.wire.node import BusyProcess

GONE = "gone"
BUSY_KEPT = 3
BUSY_PERCENT = 10.0
"""A process outside the run counts as busy above this share of one CPU."""
BUSY_EVERY_S = 2.0
"""Looking at every process of a node costs milliseconds, so it is not done at each sample."""


def process_state(pid: int) -> str:
    """The state of the process as psutil names it, or "gone"."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return GONE
    except psutil.Error:
        return ""


class RunDelay:
    """Share of the time in which a process's main thread was ready to run and had no CPU: the second figure of
    /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst), by differences. The main thread is the one that
    trains."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root
        self._last: dict[int, tuple[int, int, float]] = {}  # rank -> (pid, delay_ns, at_s)

    def sample(self, pids: Mapping[int, int], now_s: float | None = None) -> dict[int, float]:
        """Rank -> percent since the previous call; absent in the first, for processes that have ended, and where the
        kernel does not say."""
        now_s = time.monotonic() if now_s is None else now_s
        found: dict[int, float] = {}
        last, self._last = self._last, {}
        for rank, pid in pids.items():
            try:
                delay_ns = int((self._root / str(pid) / "schedstat").read_text().split()[1])
            except (OSError, ValueError, IndexError):
                continue
            self._last[rank] = (pid, delay_ns, now_s)
            before = last.get(rank)
            if before is not None and before[0] == pid and now_s > before[2]:
                share = (delay_ns - before[1]) / 1e9 / (now_s - before[2])
                found[rank] = round(100 * min(1.0, max(0.0, share)), 1)
        return found


class BusyProcesses:
    """The processes outside the run that use the most CPU time."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[float, float]] = {}  # pid -> (created, cpu seconds)
        self._looked_s = 0.0
        self._found: list[BusyProcess] = []

    def sample(self, own: set[int], now_s: float | None = None) -> list[BusyProcess]:
        """The busiest, at most BUSY_KEPT. own: process ids of the run. Looks every BUSY_EVERY_S; in between, the
        result is the one before."""
        now_s = time.monotonic() if now_s is None else now_s
        if self._last and now_s - self._looked_s < BUSY_EVERY_S:
            return self._found
        elapsed, self._looked_s = now_s - self._looked_s, now_s
        last, self._last = self._last, {}
        busy: list[BusyProcess] = []
        for process in psutil.process_iter():
            try:
                if process.pid in own:
                    continue
                times = process.cpu_times()
                used, created = times.user + times.system, process.create_time()
                self._last[process.pid] = (created, used)
                before = last.get(process.pid)
                if before is None or before[0] != created:
                    continue
                percent = 100 * (used - before[1]) / elapsed
                if percent >= BUSY_PERCENT:
                    busy.append(BusyProcess(pid=process.pid, name=process.name(), cpu_percent=round(percent, 1)))
            except psutil.Error:  # it has ended, or is another user's
                continue
        self._found = sorted(busy, key=lambda one: -one.cpu_percent)[:BUSY_KEPT]
        return self._found
