"""A rank's memory at one moment: the engine's ledger, torch's allocator, the process and the host."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from runtime.host.ledger import Ledger
from runtime.host.memory_limits import Limits, read_limits
from runtime.wire.messages import Category
from runtime.wire.sizes import format_size


@dataclass(frozen=True)
class MemoryReport:
    """One rank's memory in bytes; None: unknown or not applicable."""

    device: torch.device
    ledger: Mapping[str, int]
    """Bytes that the engines hold on `device`, by category."""
    offloaded: Mapping[str, int]
    """Bytes that the engines hold in host memory because of offload, by category."""
    pinned_bytes: int
    rss_bytes: int
    """Resident memory of the process."""
    limits: Limits
    """Available memory of the host and the control group."""
    host_total_bytes: int
    address_space: tuple[int, int] | None = None
    """(used, limit) of the address space, if limited (ulimit -v)."""
    allocated_bytes: int | None = None
    """In torch's tensors on the GPU."""
    reserved_bytes: int | None = None
    """Taken from the GPU by torch's allocator, in tensors or cached."""
    free_device_bytes: int | None = None
    total_device_bytes: int | None = None
    shared_bytes: tuple[int, int] | None = None
    """(size, free) of /dev/shm."""

    @property
    def activations_bytes(self) -> int:
        """Memory in use that the engines' ledgers do not explain: activations and temporary tensors."""
        mine = sum(self.ledger.values())
        if self.device.type != "cpu":
            return max(0, (self.allocated_bytes or 0) - mine)
        return max(0, self.rss_bytes - mine - sum(self.offloaded.values()))

    @property
    def cached_bytes(self) -> int | None:
        """Reserved by torch's allocator but in no tensor."""
        if self.allocated_bytes is None or self.reserved_bytes is None:
            return None
        return self.reserved_bytes - self.allocated_bytes

    @property
    def free_host_bytes(self) -> int | None:
        """Host memory that this rank can still allocate, under all limits."""
        free = min(self.limits.available_bytes, self.limits.group_left_bytes)
        if self.address_space is not None:
            free = min(free, self.address_space[1] - self.address_space[0])
        return None if math.isinf(free) else max(0, int(free))


def take_memory_report(ledgers: Sequence[Ledger], device: torch.device) -> MemoryReport:
    """The current report; allocates next to nothing itself."""
    memory = psutil.Process(os.getpid()).memory_info()
    bound = resource.getrlimit(resource.RLIMIT_AS)[0]
    allocated = reserved = free = total = None
    if device.type == "cuda" and torch.cuda.is_initialized():
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        try:
            free, total = torch.cuda.mem_get_info(device)
        except RuntimeError:  # after some errors every CUDA call fails
            free = total = None
    return MemoryReport(
        device=device,
        ledger=_sum(ledger.totals() for ledger in ledgers),
        offloaded=_sum(ledger.offloaded() for ledger in ledgers),
        pinned_bytes=sum(ledger.pinned()[1] for ledger in ledgers),
        rss_bytes=memory.rss,
        limits=read_limits(),
        host_total_bytes=psutil.virtual_memory().total,
        address_space=None if bound == resource.RLIM_INFINITY else (memory.vms, bound),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        free_device_bytes=free,
        total_device_bytes=total,
        shared_bytes=shared_memory(),
    )


def shared_memory() -> tuple[int, int] | None:
    """(size, free) of /dev/shm in bytes; None if there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _sum(parts: Iterable[Mapping[Category, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total


# ---- formatting ------------------------------------------------------------------------------------------------------
def report_lines(held: MemoryReport, place: str) -> Iterator[str]:
    """The report as lines of text; the memory that ran out (`place`: "device" or "host") comes first."""
    if held.device.type == "cpu":
        yield from _host_only(held)
        return
    on_device, on_host = list(_device_lines(held)), list(_host_lines(held))
    yield from (on_device + on_host) if place == "device" else (on_host + on_device)


def _device_lines(held: MemoryReport) -> Iterator[str]:
    of = f" ({format_size(held.total_device_bytes)})" if held.total_device_bytes else ""
    yield f"In use on {held.device}{of}:"
    yield from _table(dict(held.ledger) | {"activations and temporary": held.activations_bytes})
    if held.cached_bytes:
        yield _line(held.cached_bytes, "cached by torch's allocator, in no tensor")
    if held.total_device_bytes is not None and held.free_device_bytes is not None:
        others = held.total_device_bytes - held.free_device_bytes - (held.reserved_bytes or 0)
        if others > 0:
            yield _line(others, "CUDA context, NCCL, and other processes on this GPU")


def _host_lines(held: MemoryReport) -> Iterator[str]:
    yield f"In use in host memory by this rank (RSS {format_size(held.rss_bytes)}; {_free(held)}):"
    offloaded = {f"offloaded {name}": size for name, size in held.offloaded.items()}
    others = held.rss_bytes - sum(held.offloaded.values())
    yield from _table(offloaded | {"the process itself, its data and its libraries": max(0, others)})
    if held.pinned_bytes:
        yield f"  {format_size(held.pinned_bytes)} of it are pinned"


def _host_only(held: MemoryReport) -> Iterator[str]:
    yield f"In use by this rank (RSS {format_size(held.rss_bytes)}; {_free(held)}):"
    parts = dict(held.ledger)
    for name, size in held.offloaded.items():
        parts[name] = parts.get(name, 0) + size
    yield from _table(parts | {"activations and temporary, and the process itself": held.activations_bytes})


def _free(held: MemoryReport) -> str:
    limits, parts = held.limits, []
    if not math.isinf(limits.available_bytes):
        parts.append(f"{format_size(limits.available_bytes)} of {format_size(held.host_total_bytes)} free on this host")
    if not math.isinf(limits.group_limit_bytes):
        left, limit = format_size(limits.group_left_bytes), format_size(limits.group_limit_bytes)
        parts.append(f"the control group has {left} of {limit} left")
    if held.address_space is not None:
        taken, bound = held.address_space
        parts.append(f"address space {format_size(taken)} of {format_size(bound)} (ulimit -v)")
    return ", ".join(parts) or "free memory unknown"


def _table(parts: Mapping[str, int]) -> Iterator[str]:
    """One line per non-empty part, largest first."""
    for name, size in sorted(parts.items(), key=lambda part: (-part[1], part[0])):
        if size:
            yield _line(size, name)


def _line(size: int, name: str) -> str:
    return f"  {format_size(size):>9}  {name}"
