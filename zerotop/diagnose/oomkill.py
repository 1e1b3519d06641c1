"""Whether the kernel killed a process because memory ran out: its counters, its log, and the memory that the run
held."""

from __future__ import annotations

import errno
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.host.memory_limits import read_limits
from runtime.process import cgroup
from runtime.wire.node import NodeStats
from zerotop.format import bytes_text

SHARED_ENOUGH_BYTES = 1 << 30
"""Ranks of one machine exchange data through /dev/shm, of which containers often have only 64 MiB."""
CGROUP, MACHINE = "the cgroup", "this machine"
_SAMPLES = 15
"""Samples of the probe that are kept, one a second: the memory in use is read from those before the kill."""
_KERNEL_LINES = 20_000
_CLOCKS_US = 5_000_000
"""The kernel's log and CLOCK_MONOTONIC drift apart by less than this."""
_KILLED = re.compile(r"Killed process (\d+) \(([^)]*)\).*?anon-rss:(\d+)kB(?:.*?shmem-rss:(\d+)kB)?")


@dataclass(frozen=True)
class Count:
    """One of the kernel's counters of out-of-memory kills, at the start of an attempt and at its end."""

    what: str
    """"the cgroup" or "this machine"."""
    before: int
    now: int

    @property
    def rose(self) -> bool:
        """Whether a kill was counted during the attempt."""
        return self.now > self.before

    def __str__(self) -> str:
        return f"oom_kill of {self.what} {self.before} -> {self.now}"


@dataclass(frozen=True)
class HostMemory:
    """Host memory during one attempt."""

    counts: tuple[Count, ...] = ()
    """The counters that can be read: of the run's control group, else of the whole machine."""
    named: Mapping[int, str] = field(default_factory=dict)
    """Rank -> what the kernel's log says about killing it."""
    rank_rss_bytes: Mapping[int, int] = field(default_factory=dict)
    """The last sample of each rank. Pages shared by several ranks are counted more than once."""
    run_rss_bytes: int = 0
    """The largest sum over all processes of the run in the last seconds."""
    total_bytes: int = 0
    """The memory of the host, or the limit of the control group if that is less."""
    shared_bytes: tuple[int, int] | None = None
    """Size of /dev/shm, and the least that was free there in the last seconds."""

    @property
    def evidence(self) -> str:
        """Why a SIGKILL came from the OOM killer; empty if nothing says so."""
        count = next((count for count in self.counts if count.rose), None)
        if count is None:
            return ""
        what = "ran out of memory" if count.what == CGROUP else "killed a process for lack of memory"
        return f"the kernel {what} ({count})"

    @property
    def told(self) -> bool:
        """Whether the kernel lets us know about OOM kills at all."""
        return bool(self.counts or self.named)

    def killed(self, rank: int) -> str:
        """Why the SIGKILL of `rank` came from the OOM killer; empty if nothing says so."""
        if rank in self.named:
            return f"the kernel ran out of memory ({self.named[rank]})"
        return self.evidence

    @property
    def held(self) -> str:
        """How much memory the run held, such as "ranks held 11.2 GiB of 12.0 GiB"."""
        held = sum(self.rank_rss_bytes.values()) or self.run_rss_bytes
        if not held or not self.total_bytes:
            return ""
        who = "ranks" if self.rank_rss_bytes else "the run"
        return f"{who} held {bytes_text(held)} of {bytes_text(self.total_bytes)}"

    @property
    def shared(self) -> str:
        """The state of /dev/shm, such as "/dev/shm has 64.0 MiB, 0 B free"."""
        if self.shared_bytes is None:
            return "there is no /dev/shm"
        size, free = self.shared_bytes
        return f"/dev/shm has {bytes_text(size)}, {bytes_text(free)} free"


class MemoryWatch:
    """Create one when an attempt starts, pass each sample of the probe to `note`, and call `seen` when the attempt has
    ended.

    `root` is where /proc, /sys and /dev are; tests pass a folder.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = dict(_counters(root))
        self._limit = read_limits(root).group_limit_bytes
        self._since_us = time.monotonic_ns() // 1000 - _CLOCKS_US
        self._samples: deque[NodeStats] = deque(maxlen=_SAMPLES)
        self._shared: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)
        self._rss: dict[int, int] = {}

    def note(self, stats: NodeStats) -> None:
        """Take a sample of the probe."""
        self._samples.append(stats)
        self._rss |= stats.rank_rss_bytes
        if (shared := shared_memory(self._root)) is not None:
            self._shared.append(shared)

    def seen(self, pids: Mapping[int, int], told: Mapping[int, int]) -> HostMemory:
        """The result. `pids`: rank -> process. `told`: rank -> the bytes that it reported itself."""
        now = dict(_counters(self._root))
        counts = tuple(Count(what, self._before[what], now[what]) for what in self._before if what in now)
        named = self._named(pids) if not counts or any(count.rose for count in counts) else {}
        shared = list(self._shared) or [found for found in (shared_memory(self._root),) if found is not None]
        return HostMemory(
            counts=counts,
            named=named,
            rank_rss_bytes=dict(told) | self._rss,
            run_rss_bytes=max((stats.run_rss_bytes for stats in self._samples), default=0),
            total_bytes=int(min(self._limit, self._samples[-1].ram_total_bytes)) if self._samples else 0,
            shared_bytes=(shared[-1][0], min(free for _, free in shared)) if shared else None,
        )

    def _named(self, pids: Mapping[int, int]) -> dict[int, str]:
        """The ranks that the kernel's log names. In a container the log has other process ids, if it can be read at
        all: then it names none."""
        ranks = {pid: rank for rank, pid in pids.items()}
        found = {}
        for at_us, text in _kernel_log(self._root):
            killed = _KILLED.search(text) if at_us >= self._since_us else None
            if killed is not None and int(killed[1]) in ranks:
                held = 1024 * (int(killed[3]) + int(killed[4] or 0))
                words = f"the kernel's log: killed process {killed[1]}, which held {bytes_text(held)}"
                found[ranks[int(killed[1])]] = words
        return found


def shared_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Size and free bytes of /dev/shm; None if there is none."""
    try:
        found = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _counters(root: Path) -> Iterator[tuple[str, int]]:
    """(what, kills): of our control group where it counts them, else of the whole machine.

    A group's counter has all kills in it, whoever's limit was reached: when it stands still, none of ours was killed.
    """
    own = [(folder, "memory.events") for folder in cgroup.folders("", root)[:1]]
    own += [(folder, "memory.oom_control") for folder in cgroup.folders("memory", root)[:1]]
    for folder, name in own:
        if (count := _oom_kill(folder / name)) is not None:
            yield CGROUP, count
            return
    if (count := _oom_kill(root / "proc/vmstat")) is not None:
        yield MACHINE, count


def _oom_kill(path: Path) -> int | None:
    for line in cgroup.read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdigit():
            return int(value)
    return None


def _kernel_log(root: Path) -> Iterator[tuple[int, str]]:
    """(microseconds since boot, text) of what the kernel still has and lets us read.

    One read gives one record, `level,number,time,flags;text` (Documentation/ABI/testing/dev-kmsg of the kernel).
    """
    try:
        descriptor = os.open(root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # not readable for everyone, or not there
        return
    try:
        for _ in range(_KERNEL_LINES):
            try:
                record = os.read(descriptor, 8192)
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten meanwhile: go on with the oldest that is left
                    continue
                return
            for line in record.decode(errors="replace").splitlines():
                head, _, text = line.partition(";")
                fields = head.split(",")
                if len(fields) > 2 and fields[2].isdigit():
                    yield int(fields[2]), text
            if not record:
                return
    finally:
        os.close(descriptor)
