"""The ledger: every persistent byte that the engine holds has a category, so that a screen can say what memory is used
for."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import get_args

import psutil
import torch

from runtime.wire.messages import Category, Memory


class Ledger:
    """Exact bytes per category, changed by whoever allocates and frees. Reading from another thread sees a recent,
    whole figure."""

    def __init__(self) -> None:
        self._bytes: dict[Category, int] = dict.fromkeys(get_args(Category), 0)
        self._peaks = dict(self._bytes)
        self._offloaded = dict(self._bytes)
        self.on_host: set[Category] = set()
        """What is in host memory for a while: for the time of a pause everything."""
        self.pinned: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Page-locked bytes: asked for, and really taken."""

    def hold(self, category: Category, tensor: torch.Tensor, offloaded: bool = False) -> torch.Tensor:
        """Count `tensor`'s own elements and hand it back, so that an allocation reads `x = ledger.hold("optimizer",
        torch.zeros(n))`. offloaded: it is in host memory because the config says so, not with the parameters."""
        self.add(category, tensor.numel() * tensor.element_size(), offloaded)
        return tensor

    def add(self, category: Category, nbytes: int, offloaded: bool = False) -> None:
        if offloaded:
            self._offloaded[category] += nbytes
            return
        self._bytes[category] += nbytes
        self._peaks[category] = max(self._peaks[category], self._bytes[category])

    def release(self, category: Category, tensor: torch.Tensor) -> None:
        self.add(category, -tensor.numel() * tensor.element_size())

    def totals(self) -> dict[Category, int]:
        """Bytes per category right now, where the parameters are."""
        return {name: 0 if name in self.on_host else held for name, held in self._bytes.items()}

    def offloaded(self) -> dict[Category, int]:
        """Bytes per category right now in host memory, to which the config or a pause moved them."""
        return {
            name: held + (self._bytes[name] if name in self.on_host else 0) for name, held in self._offloaded.items()
        }

    def peaks(self) -> dict[Category, int]:
        """The most bytes that each category has held, where the parameters are."""
        return dict(self._peaks)

    def total_bytes(self) -> int:
        """Where the parameters are."""
        return sum(self._bytes.values())


MAPPED_FROM = 1 << 20
"""Bytes from which a CPU tensor gets pages of its own."""


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(numel,) zeros, for what lives as long as the engine and for what exists once, at its start.

    On a CPU large ones are pages of their own: they take no memory until they are written, all of it goes back to the
    system when the tensor is collected, and they leave no holes in malloc's heap, which keeps them.
    """
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < MAPPED_FROM or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=numel)


def memory_message(rank: int, ledger: Ledger, device: torch.device) -> Memory:
    """The ledger beside what the process and the device report."""
    allocated = reserved = used = total = None
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
    requested, real = ledger.pinned()
    return Memory(
        rank=rank,
        ledger=ledger.totals(),
        offloaded=ledger.offloaded(),
        pinned_requested_bytes=requested,
        pinned_bytes=real,
        rss_bytes=psutil.Process(os.getpid()).memory_info().rss,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        device_used_bytes=used,
        device_total_bytes=total,
        host_total_bytes=psutil.virtual_memory().total,
        at_ns=time.monotonic_ns(),
    )
