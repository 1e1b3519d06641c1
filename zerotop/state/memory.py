"""Where a rank's memory is: the ledger's exact categories, and what can be derived beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from runtime.wire.messages import Category, GpuStats, Memory
from zerotop.state.run import RankState, RunState

LEDGER_CATEGORIES: tuple[str, ...] = get_args(Category)
DERIVED_CATEGORIES = ("activations", "cache", "other")
"""Not counted but computed: activations = allocated - ledger; cache = reserved - allocated; other = what the driver
(CPU: the kernel) sees beyond."""
CATEGORIES = LEDGER_CATEGORIES + DERIVED_CATEGORIES


@dataclass(frozen=True)
class MemoryUse:
    """One rank's memory in bytes. `parts` holds the categories that are not empty, in CATEGORIES order."""

    parts: tuple[tuple[str, int], ...]
    used_bytes: int
    total_bytes: int  # the device's, or the host's RAM
    on_gpu: bool
    pinned_bytes: int = 0


def memory_use(memory: Memory) -> MemoryUse:
    """On a GPU the device's memory, as the allocator and the driver see it; on a CPU the process's resident set."""
    parts: dict[str, int] = {name: memory.ledger.get(name, 0) for name in LEDGER_CATEGORIES}  # type: ignore[call-overload]
    ledger = sum(parts.values())
    if memory.allocated_bytes is None:
        used = max(memory.rss_bytes, ledger)
        parts["other"] = used - ledger
        return _use(parts, used, memory.host_total_bytes, False, memory.pinned_bytes)
    # States that live on the host are in the ledger too: only what fits into the allocator's figure can be on the
    # device.
    allocated = memory.allocated_bytes
    reserved = max(memory.reserved_bytes or 0, allocated)
    parts["activations"] = max(0, allocated - ledger)
    parts["cache"] = reserved - allocated
    used = memory.device_used_bytes if memory.device_used_bytes is not None else reserved
    parts["other"] = max(0, used - reserved)
    return _use(parts, max(used, reserved), memory.device_total_bytes or 0, True, memory.pinned_bytes)


def _use(parts: dict[str, int], used: int, total: int, on_gpu: bool, pinned: int) -> MemoryUse:
    kept = tuple((name, parts[name]) for name in CATEGORIES if parts.get(name, 0) > 0)
    return MemoryUse(kept, used, total, on_gpu, pinned)


def gpu_of(state: RunState, rank: RankState) -> GpuStats | None:
    """The probe's word on this rank's device, joined on its UUID (never on a PID: NVML gives the host's)."""
    hello = rank.hello
    node = state.nodes.get(hello.host) if hello else None
    if hello is None or node is None or not node.gpus or not hello.device_uuid:
        return None
    wanted = hello.device_uuid.removeprefix("GPU-")
    return next((gpu for gpu in node.gpus if gpu.uuid.removeprefix("GPU-") == wanted), None)
