"""The ledger: counts all memory that the engine keeps, by category, so that a screen can show what it is used for."""

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
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=numel)


def memory_message(rank: int, ledger: Ledger, device: torch.device) -> Memory:
    """The telemetry message with the ledger, the process's memory and the device's."""
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
