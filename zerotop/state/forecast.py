"""The next peaks of memory: what is coming, what it will need, and whether that is free now.

Pure functions over the state. What something needs comes from the plan that each rank sends (runtime/plan, for the
model as the engine cut it) and from the ranks' ledgers; what is free comes from the nodes' probes and from the driver.
A checkpoint goes through slots where runtime/checkpoint would decide so: both ask `host_has_room`.

An evaluation keeps nothing for a backward, and takes less than a training step. But the one before the first step comes
first, and what it takes is known then. The closed forms of an evaluation and an export: runtime/plan/estimate.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runtime.host.memory_limits import Limits, host_has_room
from runtime.wire.messages import Memory, PlannedMemory
from runtime.wire.node import NodeStats
from zerotop.format import bytes_text
from zerotop.state.run import RankState, RunState
from zerotop.state.settings import known_values

_LIVE = ("starting", "running", "paused", "restarting")


@dataclass(frozen=True)
class Need:
    """Memory that something in the future will need beyond what is in use now, in bytes."""

    event: str
    """`step` (the first one), `checkpoint`, `evaluation`, `restart`, `consolidated` (save_16bit_model) or `export`."""
    place: str
    """Of a node its name, of a GPU its rank: `rank 3`."""
    need_bytes: int
    free_bytes: int
    text: str
    """One sentence with both figures."""
    brief: str
    """The same in a few words, for a panel."""
    certain: bool = True
    """Whether it comes by itself, and not only if somebody asks for it or something fails."""

    @property
    def short(self) -> bool:
        """Whether more is needed than is free."""
        return self.need_bytes > self.free_bytes

    @property
    def share(self) -> float:
        """The need as a share of what is free."""
        return self.need_bytes / self.free_bytes if self.free_bytes > 0 else math.inf

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "event": self.event,
            "place": self.place,
            "need_bytes": self.need_bytes,
            "free_bytes": self.free_bytes,
            "short": self.short,
            "certain": self.certain,
            "text": self.text,
        }


def forecast(state: RunState) -> list[Need]:
    """All needs that can be computed, the most pressing first. Empty once the run has ended."""
    if state.state_name not in _LIVE:
        return []
    needs = [*_of_gpus(state)]
    for node in state.nodes.values():
        ranks = [rank for rank in state.ranks.values() if rank.hello is not None and rank.hello.host == node.host]
        if ranks and node.ram_available_bytes is not None:
            needs += _of_host(state, node, ranks, node.ram_available_bytes)
    return sorted(needs, key=lambda need: (not need.certain, -need.share))


def most_pressing(state: RunState) -> Need | None:
    """The need to show: the one that takes the largest share of what is free, if it comes by itself or if there is too
    little for it."""
    found = [need for need in forecast(state) if need.certain or need.short]
    return max(found, key=lambda need: (need.short and need.certain, need.certain, need.share), default=None)


# ---- hosts -----------------------------------------------------------------------------------------------------------
def _of_host(state: RunState, node: NodeStats, ranks: list[RankState], free: int) -> Iterator[Need]:
    if all(rank.step is None for rank in ranks):
        untouched = sum(rank.memory.untouched_bytes for rank in ranks if rank.memory is not None)
        if untouched:
            yield _need("step", node.host, untouched, free, "the first optimizer step", "more of host RAM")
    planned = [
        (rank, rank.hello.planned) for rank in ranks if rank.hello is not None and rank.hello.planned is not None
    ]
    if not planned:
        return
    yield from _checkpoint(state, node, planned, free)
    yield from _evaluation_on_host(state, node, planned, free)
    first = next((plan for rank, plan in planned if rank.rank == 0), None)
    if first is not None and first.build_bytes:
        yield _need(
            "restart", node.host, first.build_bytes, free, "a restart",
            "of host RAM more than the run takes now, while rank 0 builds the model,", certain=False,
        )  # fmt: skip
    if first is not None and first.consolidated_bytes:
        yield _need(
            "consolidated", node.host, first.consolidated_bytes, free, "save_16bit_model()",
            "of host RAM for all weights on rank 0", certain=False,
        )  # fmt: skip
    if first is not None and first.export_bytes:
        yield _need("export", node.host, first.export_bytes, free, "zerotop export", "of host RAM", certain=False)


def _checkpoint(
    state: RunState, node: NodeStats, planned: list[tuple[RankState, PlannedMemory]], free: int
) -> Iterator[Need]:
    """The copies from which the next checkpoint is written, unless the ranks have them already."""
    waiting = [plan for rank, plan in planned if rank.memory is not None and not _copy_of(rank.memory)]
    if not waiting:
        return
    each = max(plan.checkpoint_bytes for plan in waiting)
    if not each:
        return
    on_gpu = any(rank.memory is not None and rank.memory.allocated_bytes is not None for rank, _ in planned)
    when, certain = _next_checkpoint(state)
    need, count = each * len(waiting), len(waiting)
    if host_has_room(each, pin=on_gpu, local_world=count, limits=limits_of(node)):
        yield _need("checkpoint", node.host, need, free, when, "of host RAM for its copy", certain)
        return
    slots = count * max(plan.checkpoint_slots_bytes for plan in waiting)
    text = (
        f"{when} will need {bytes_text(need)} of host RAM, {bytes_text(free)} are free: it will be written through "
        f"slots of {bytes_text(slots)}, and the step after it may wait for the disk"
    )
    brief = f"{when}: {bytes_text(need)}, {bytes_text(free)} free: through slots"
    yield Need("checkpoint", node.host, need, free, text, brief, certain)


def _copy_of(memory: Memory) -> int:
    return memory.ledger.get("snapshot", 0) + memory.offloaded.get("snapshot", 0)


def _next_checkpoint(state: RunState) -> tuple[str, bool]:
    """What to call the next checkpoint, and whether it comes by itself."""
    knobs = known_values(state)
    interval = knobs.get("checkpoint_interval") or 0
    if isinstance(interval, int) and interval > 0:
        step = (state.step // interval + 1) * interval
        last = state.hello.steps if state.hello is not None else None
        return f"the checkpoint at step {step if last is None else min(step, last)}", True
    if knobs.get("checkpoint_minutes"):
        return "the next checkpoint", True
    return "a checkpoint", False


def _evaluation_on_host(
    state: RunState, node: NodeStats, planned: list[tuple[RankState, PlannedMemory]], free: int
) -> Iterator[Need]:
    """The next evaluation of ranks on the CPU, less what malloc keeps for the like of it."""
    need = sum(
        max(0, plan.evaluation_bytes - rank.memory.rss_parts.get("allocator", 0))
        for rank, plan in planned
        if rank.memory is not None and rank.memory.allocated_bytes is None
    )
    if need and (when := _next_evaluation(state, planned[0][1])):
        yield _need("evaluation", node.host, need, free, when, "more of host RAM")


def _next_evaluation(state: RunState, plan: PlannedMemory) -> str:
    """What to call the next evaluation; empty if there is none."""
    if not plan.evaluation_interval or state.hello is None:
        return ""
    last, newest = state.hello.steps, state.evaluations.newest
    if state.step == 0 and newest is None:
        return "the evaluation before the first step"
    step = (state.step // plan.evaluation_interval + 1) * plan.evaluation_interval
    return "" if last is not None and state.step >= last else f"the evaluation at step {min(step, last or step)}"


def limits_of(node: NodeStats) -> Limits:
    """What `read_limits` finds on that node."""
    limit, used = node.cgroup_limit_bytes, node.cgroup_used_bytes
    return Limits(
        available_bytes=math.inf if node.ram_available_bytes is None else node.ram_available_bytes,
        swap_bytes=0,  # no plan should count on it
        group_limit_bytes=math.inf if limit is None else limit,
        group_left_bytes=math.inf if limit is None or used is None else max(0, limit - used),
        memlock_bytes=math.inf,
    )


# ---- GPUs ------------------------------------------------------------------------------------------------------------
def _of_gpus(state: RunState) -> Iterator[Need]:
    """Of each GPU the first step, which allocates everything that the engine does not hold from the start, and the next
    evaluation, for which activations of a step have made room."""
    for rank in state.ranks.values():
        memory, plan = rank.memory, rank.hello.planned if rank.hello is not None else None
        if memory is None or memory.allocated_bytes is None or plan is None:
            continue
        if not plan.shape_known or memory.device_total_bytes is None or memory.device_used_bytes is None:
            continue
        cached = max(0, (memory.reserved_bytes or 0) - memory.allocated_bytes)
        free = memory.device_total_bytes - memory.device_used_bytes + cached
        place = f"rank {rank.rank}"
        if plan.evaluation_bytes and (when := _next_evaluation(state, plan)):
            yield _need("evaluation", place, plan.evaluation_bytes, free, when, "more on the GPU")
        planned = sum(size for name, size in plan.device_bytes.items() if name != "context")
        need = planned - memory.allocated_bytes
        if need > 0 and rank.step is None:
            yield _need("step", place, need, free, "the first step", "more on the GPU")


def _need(event: str, place: str, need: int, free: int, name: str, of: str, certain: bool = True) -> Need:
    """name: what will need the memory, as the sentence begins. of: which memory, and for what."""
    available = f"{'only ' * (need > free)}{bytes_text(free)}"
    where = f" of {place}" if place.startswith("rank ") else f" on {place}"
    text = f"{name} will need {bytes_text(need)} {of}{where}, {available} are free"
    return Need(event, place, need, free, text, f"{name}: {bytes_text(need)}, {available} free", certain)
