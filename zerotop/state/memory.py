"""Where the memory of a rank is: the exact categories of the ledger, and what can be derived beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import get_args

from runtime.wire.messages import Category, Memory, PhaseName, PlannedMemory
from runtime.wire.node import GpuStats
from zerotop.format import bytes_text
from zerotop.state.run import RankState, RunState

DERIVED_CATEGORIES = ("activations", "cache", "imports", "libraries", "mapped_files", "other")
"""Computed or measured from outside, not counted by the ledger. On a GPU: activations = allocated - ledger; cache =
reserved - allocated; other = what the driver reports beyond that: the CUDA context, NCCL, other processes. On a CPU
they come from the kernel and from malloc (runtime/host/rss_parts.py): cache is what malloc keeps free, other what is
left of the RSS. Logits are counted where the loss is the trainer's own, and taken out of activations: what is left of
these is derived. Of activations, the ledger counts what is offloaded to host memory."""
LEDGER_CATEGORIES: tuple[str, ...] = tuple(name for name in get_args(Category) if name not in DERIVED_CATEGORIES)
CATEGORIES = (*LEDGER_CATEGORIES, "logits", *DERIVED_CATEGORIES)
_LABELS = {"snapshot": "checkpoint copy", "imports": "Python, data", "mapped_files": "mapped files"}
SHORT_LABELS = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim",
    "communication": "comm",
    "snapshot": "ckpt",
    "activations": "activ",
    "imports": "Python",
    "libraries": "libs",
    "mapped_files": "mapped",
}
"""Names of categories for one line of 80 columns."""
_OF_RSS = {"allocator": "cache", "rest": "other"}
"""Names on the wire that differ from the category's."""


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
    untouched_bytes: int = 0
    """On a CPU: by how much `parts` exceed what is in memory, because nothing has written to these pages yet."""

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
        if not memory.rss_parts:  # not Linux, or a rank of an older version
            used = max(memory.rss_bytes, ledger)
            parts["other"] = used - ledger
            return _use(parts, used, memory.host_total_bytes, False, memory.pinned_bytes)
        for name, count in memory.rss_parts.items():
            name = _OF_RSS.get(name, name)
            name = name if name in CATEGORIES else "other"
            parts[name] = parts.get(name, 0) + count
        _take_out_logits(parts, memory)
        use = _use(parts, memory.rss_bytes, memory.host_total_bytes, False, memory.pinned_bytes)
        return replace(use, untouched_bytes=memory.untouched_bytes)
    ledger = sum(parts.values())
    allocated = memory.allocated_bytes
    reserved = max(memory.reserved_bytes or 0, allocated)
    parts["activations"] = max(0, allocated - ledger)
    _take_out_logits(parts, memory)
    parts["cache"] = reserved - allocated
    used = memory.device_used_bytes if memory.device_used_bytes is not None else reserved
    parts["other"] = max(0, used - reserved)
    return _use(parts, max(used, reserved), memory.device_total_bytes or 0, True, memory.pinned_bytes, offloaded)


def _take_out_logits(parts: dict[str, int], memory: Memory) -> None:
    """Make logits a part of their own. They may have been freed between the two measurements of one message."""
    parts["logits"] = min(memory.logits_bytes, parts.get("activations", 0))
    parts["activations"] = parts.get("activations", 0) - parts["logits"]


def process_bytes(memory: Memory) -> int:
    """On a CPU: what the process takes beside its states and activations, which no plan knows."""
    own = ("imports", "libraries", "mapped_files")
    return sum(memory.rss_parts.get(name, 0) for name in own)


def planned_peak(memory: Memory, plan: PlannedMemory | None) -> int | None:
    """The peak that the plan expects, as `Memory.peak_bytes` measures it; None if the plan does not know the
    activations. On a CPU with what the process itself and the checkpoint copy take."""
    if plan is None or not plan.shape_known:
        return None
    planned = sum(size for name, size in plan.device_bytes.items() if name != "context")
    if memory.allocated_bytes is not None:
        return planned
    return planned + process_bytes(memory) + memory.offloaded.get("snapshot", 0) if memory.rss_parts else None


def peak_text(memory: Memory, plan: PlannedMemory | None) -> str:
    """The largest peak, its phase, and the plan's figure for it; empty without peaks."""
    peaks = {phase: size for phase, size in memory.peak_bytes.items() if phase != "init"}
    if not peaks:
        return ""
    phase = max(peaks, key=peaks.__getitem__)
    planned = planned_peak(memory, plan)
    return f"peak {bytes_text(peaks[phase])} in {phase}" + (f", plan {bytes_text(planned)}" if planned else "")


def phase_peaks_text(memory: Memory) -> str:
    """The peaks of all phases, largest first, and of activations."""

    def listed(figures: Mapping[PhaseName, int]) -> str:
        ordered = sorted(figures.items(), key=lambda one: -one[1])
        return " · ".join(f"{phase} {bytes_text(size)}" for phase, size in ordered if size)

    peaks, activations = listed(memory.peak_bytes), listed(memory.activation_bytes)
    text = f"peaks: {peaks}" if peaks else ""
    if text and activations:
        logits = f"; of them logits at most {bytes_text(memory.logits_peak_bytes)}" if memory.logits_peak_bytes else ""
        text += f"; activations: {activations}{logits}"
    return text


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
