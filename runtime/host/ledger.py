"""The ledger: counts all memory that the engine keeps, by category, so that a screen can show what it is used for."""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Callable
from typing import get_args

import psutil
import torch

from runtime.host.live_logits import logits
from runtime.host.phase_peaks import PhasePeaks, read_gpu, read_process
from runtime.host.resident import CountedPages
from runtime.host.rss_parts import account
from runtime.wire.messages import Category, Memory


class Ledger:
    """Exact bytes per category, updated by all code that allocates or frees. Other threads may read it: they see recent
    figures."""

    def __init__(self) -> None:
        self._bytes: dict[Category, int] = dict.fromkeys(get_args(Category), 0)
        self._peaks = dict(self._bytes)
        self._offloaded = dict(self._bytes)
        self.on_host: set[Category] = set()
        """Categories that a pause has moved to host memory."""
        self.pinned: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Returns the bytes of pinned memory: requested, and allocated in whole pages."""
        self.unit_activations: dict[str, tuple[int, int]] = {}
        """Not counted but measured in a step now and then, and replaced as a whole: kind of unit -> how many, and the
        bytes that their forwards leave for backward."""

    def hold(self, category: Category, tensor: torch.Tensor, offloaded: bool = False) -> torch.Tensor:
        """Count `tensor`'s elements and return it, for `x = ledger.hold("optimizer", torch.zeros(n))`. offloaded:
        whether the config has offloaded it to host memory."""
        self.add(category, tensor.numel() * tensor.element_size(), offloaded)
        return tensor

    def add(self, category: Category, nbytes: int, offloaded: bool = False) -> None:
        """Count `nbytes`, which may be negative."""
        if offloaded:
            self._offloaded[category] += nbytes
            return
        self._bytes[category] += nbytes
        self._peaks[category] = max(self._peaks[category], self._bytes[category])

    def release(self, category: Category, tensor: torch.Tensor) -> None:
        """Stop counting `tensor`, which is not offloaded."""
        self.add(category, -tensor.numel() * tensor.element_size())

    def totals(self) -> dict[Category, int]:
        """Current bytes per category on the training device."""
        return {name: 0 if name in self.on_host else held for name, held in self._bytes.items()}

    def offloaded(self) -> dict[Category, int]:
        """Current bytes per category in host memory, to which the config or a pause has moved them."""
        return {
            name: held + (self._bytes[name] if name in self.on_host else 0) for name, held in self._offloaded.items()
        }

    def peaks(self) -> dict[Category, int]:
        """Largest bytes so far per category on the training device."""
        return dict(self._peaks)

    def total_bytes(self) -> int:
        """Current bytes of all categories on the training device, states that a pause has moved included."""
        return sum(self._bytes.values())


MAPPED_FROM = 1 << 20
"""Size in bytes from which `zeros` gives a CPU tensor pages of its own."""


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(numel,) zeros, for tensors that live as long as the engine or only during its start.

    On a CPU a large tensor has pages of its own: they take no memory until they are written, are returned to the system
    when the tensor is freed, and leave no holes in malloc's heap.
    """
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < MAPPED_FROM or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    return torch.frombuffer(CountedPages.make(nbytes), dtype=dtype, count=numel)


def host_ledger_bytes(ledger: Ledger, device: torch.device) -> int:
    """Bytes of the ledger in this process's memory: all of it on a CPU, else what the config or a pause has moved
    there."""
    offloaded = sum(ledger.offloaded().values())
    return offloaded + sum(ledger.totals().values()) if device.type == "cpu" else offloaded


def phase_peaks(device: torch.device, ledger: Ledger) -> PhasePeaks:
    """The peaks of a rank on `device`, whose states `ledger` counts."""
    if device.type == "cuda":
        return PhasePeaks(lambda: read_gpu(device, sum(ledger.totals().values())))
    return PhasePeaks(lambda: read_process(host_ledger_bytes(ledger, device)))


def memory_message(rank: int, ledger: Ledger, device: torch.device, peaks: PhasePeaks | None = None) -> Memory:
    """The telemetry message with the ledger, the process's memory and the device's."""
    allocated = reserved = used = total = retries = inactive = None
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
        retries, inactive = stats.get("num_alloc_retries"), stats.get("inactive_split_bytes.all.current")
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    requested, real = ledger.pinned()
    parts = account().parts(host_ledger_bytes(ledger, device))
    return Memory(
        rank=rank,
        ledger=ledger.totals(),
        offloaded=ledger.offloaded(),
        pinned_requested_bytes=requested,
        pinned_bytes=real,
        rss_bytes=parts.rss if parts is not None else psutil.Process(os.getpid()).memory_info().rss,
        rss_parts=parts.named() if parts is not None else {},
        untouched_bytes=parts.untouched if parts is not None else 0,
        major_faults=resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        logits_bytes=logits.nbytes(),
        logits_peak_bytes=logits.most_bytes,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        alloc_retries=retries,
        inactive_split_bytes=inactive,
        device_used_bytes=used,
        device_total_bytes=total,
        peak_bytes=dict(peaks.peaks) if peaks is not None else {},
        activation_bytes=dict(peaks.activations) if peaks is not None else {},
        unit_activations=ledger.unit_activations,
        host_total_bytes=psutil.virtual_memory().total,
        at_ns=time.monotonic_ns(),
    )
