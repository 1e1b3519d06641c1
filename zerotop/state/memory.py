"""Where the memory of a rank is: the exact categories of the ledger, and what can be derived beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from runtime.wire.messages import Category, GpuStats, Memory
from zerotop.state.run import RankState, RunState

DERIVED_CATEGORIES = ("activations", "cache", "other")
"""Computed, not counted: activations = allocated - ledger; cache = reserved - allocated; other = what the driver (on a
CPU: the kernel) reports beyond that. Of activations, the ledger counts what is offloaded to host memory."""
LEDGER_CATEGORIES: tuple[str, ...] = tuple(name for name in get_args(Category) if name not in DERIVED_CATEGORIES)
CATEGORIES = LEDGER_CATEGORIES + DERIVED_CATEGORIES
_LABELS = {"snapshot": "checkpoint copy"}


def category_label(name: str) -> str:
    """The name of a category on the screen."""
    return _LABELS.get(name, name)


@dataclass(frozen=True)
class MemoryUse:
    """The memory of one rank in bytes. `parts` holds the categories that are not empty, in the order of CATEGORIES."""

    parts: tuple[tuple[str, int], ...]
    used_bytes: int
    total_bytes: int  # the device's, or the host's RAM
    on_gpu: bool
    pinned_bytes: int = 0
    offloaded: tuple[tuple[str, int], ...] = ()
    """On a GPU: what the config keeps in host memory, by category; not part of `parts`."""

    @property
    def offloaded_bytes(self) -> int:
        """The sum of `offloaded`."""
        return sum(count for _, count in self.offloaded)


def memory_use(memory: Memory) -> MemoryUse:
    """On a GPU the device's memory, as the allocator and the driver report it; on a CPU the resident set of the
    process."""
    parts: dict[str, int] = {name: memory.ledger.get(name, 0) for name in LEDGER_CATEGORIES}  # type: ignore[call-overload]
    offloaded = {str(name): count for name, count in memory.offloaded.items() if count}
    if memory.allocated_bytes is None:
        for name, count in offloaded.items():  # the same memory there
            parts[name] = parts.get(name, 0) + count
        ledger = sum(parts.values())
        used = max(memory.rss_bytes, ledger)
        parts["other"] = used - ledger
        return _use(parts, used, memory.host_total_bytes, False, memory.pinned_bytes)
    ledger = sum(parts.values())
    allocated = memory.allocated_bytes
    reserved = max(memory.reserved_bytes or 0, allocated)
    parts["activations"] = max(0, allocated - ledger)
    parts["cache"] = reserved - allocated
    used = memory.device_used_bytes if memory.device_used_bytes is not None else reserved
    parts["other"] = max(0, used - reserved)
    return _use(parts, max(used, reserved), memory.device_total_bytes or 0, True, memory.pinned_bytes, offloaded)


def _use(
    parts: dict[str, int], used: int, total: int, on_gpu: bool, pinned: int, offloaded: dict[str, int] | None = None
) -> MemoryUse:
    return MemoryUse(_in_order(parts), used, total, on_gpu, pinned, _in_order(offloaded or {}))


def _in_order(parts: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, parts[name]) for name in CATEGORIES if parts.get(name, 0) > 0)


def gpu_of(state: RunState, rank: RankState) -> GpuStats | None:
    """The probe's sample of this rank's device, found by its UUID (never by process id: NVML reports those of the
    host)."""
    hello = rank.hello
    node = state.nodes.get(hello.host) if hello else None
    if hello is None or node is None or not node.gpus or not hello.device_uuid:
        return None
    wanted = hello.device_uuid.removeprefix("GPU-")
    return next((gpu for gpu in node.gpus if gpu.uuid.removeprefix("GPU-") == wanted), None)
