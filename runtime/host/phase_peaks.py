"""The most memory that each phase of a rank has taken, measured without synchronisation.

On a GPU torch's allocator keeps the peak, on a CPU the kernel does (VmHWM); both are read and reset when a phase ends.
(So torch.cuda.max_memory_allocated() of a script counts from the newest phase, and VmHWM too.) One reading takes about
25 us on a CPU. Readings are skipped where all of them would take more than COST_SHARE of the time; the peak of a
skipped phase then counts with those after it, for the longest of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from runtime.host.resident import read_resident, reset_peak
from runtime.host.rss_parts import account
from runtime.wire.messages import PhaseName

COST_SHARE = 0.001


class Reading(NamedTuple):
    """Memory in bytes at the end of a phase."""

    peak: int
    """The most since the previous reading."""
    activations: int
    """Of it what the ledger does not hold: on a GPU at the peak, on a CPU now."""


class PhasePeaks:
    """Keeps the peaks of one rank. The training thread calls `phase_ended`; other threads may read the figures."""

    def __init__(self, read: Callable[[], Reading | None], thread_ns: Callable[[], int] = time.thread_time_ns) -> None:
        """read: the peak since the last call; None where it can't be measured. thread_ns: CPU time of this thread, as a
        busy machine may take the CPU away in the middle of a reading."""
        self._read, self._thread_ns = read, thread_ns
        self._began_ns: int | None = None
        self._spent_ns = 0
        self._since: dict[PhaseName, int] = {}
        """Phases since the last reading -> nanoseconds in them."""
        self.peaks: dict[PhaseName, int] = {}
        """The most so far, by phase."""
        self.activations: dict[PhaseName, int] = {}

    def phase_ended(self, phase: PhaseName, began_ns: int, ended_ns: int) -> None:
        """For `Recorder.phase_ended`."""
        since = self._since
        since[phase] = since.get(phase, 0) + ended_ns - began_ns
        if self._began_ns is None:
            self._began_ns = began_ns
        if self._spent_ns > COST_SHARE * (ended_ns - self._began_ns):
            return
        before_ns = self._thread_ns()
        reading = self._read()
        if reading is not None:
            longest = max(since, key=since.__getitem__)
            # Replaced and not changed: the publisher may be copying them.
            if reading.peak > self.peaks.get(longest, -1):
                self.peaks = {**self.peaks, longest: reading.peak}
            if reading.activations > self.activations.get(phase, -1):
                self.activations = {**self.activations, phase: reading.activations}
        since.clear()
        self._spent_ns += self._thread_ns() - before_ns


def read_gpu(device: torch.device, ledger_bytes: int) -> Reading:
    """The peak of torch's allocator since the last call. ledger_bytes: what the ledger counts on the GPU."""
    peak = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
    torch.cuda.reset_peak_memory_stats(device)
    return Reading(peak, max(0, peak - ledger_bytes))


def read_process(ledger_bytes: int) -> Reading | None:
    """The peak of the RSS since the last call; None where the kernel does not let us reset it. ledger_bytes: what the
    ledger counts in host memory."""
    resident = read_resident()
    if resident is None or not reset_peak():
        return None
    return Reading(resident.peak, account().heap_activations(ledger_bytes) or 0)
