"""What limits the run: memory, heat and power, offload."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from zerotop.format import bytes_text, ms_text
from zerotop.state.gpu import Concern, concerns
from zerotop.state.stall import ranks_text
from zerotop.verdict.figures import FAULTS_PER_S, Figures
from zerotop.verdict.finding import Finding, Severity, What

KEPT_FAULTS_PER_S = 20.0
"""Page faults per second that keep the verdict; they are counted over all that is remembered then."""
SWAP_BYTES_PER_S = 2.0**20
PRESSURE_PERCENT = 10.0
OFFLOAD_SHARE, KEPT_OFFLOAD_SHARE = 0.25, 0.18
THROTTLED = frozenset({"hot", "power brake", "slowed down", "power cap"})


def find_memory_bound(figures: Figures) -> Finding | None:
    """Memory is so short that the allocator frees its cache again and again, or pages are read back from disk."""
    if figures.state.state_name != "running":
        return None
    before = figures.before
    was_bound = before is not None and before.what == "memory-bound" and "part" not in before.facts  # not a straggler's
    retried = {rank: kept[-1].alloc_retries - kept[0].alloc_retries for rank, kept in figures.memory.items()}
    worst = max(retried, key=lambda rank: retried[rank], default=None)
    if worst is not None and retried[worst] > 0:
        span = figures.memory[worst][-1].at_s - figures.memory[worst][0].at_s
        return Finding(
            "memory-bound",
            f"the CUDA allocator of rank {worst} ran out of memory and freed its cache {retried[worst]} times in the "
            f"last {span:.0f} s; each time the GPU stands still",
            "warning",
            (worst,),
            "Lower the micro-batch, turn on activation checkpointing, or set PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True.",
            {"alloc_retries": retried[worst], "seconds": round(span)},
        )
    least = KEPT_FAULTS_PER_S if was_bound else FAULTS_PER_S
    paging = {rank: figures.page_faults_per_s(rank, over_all=was_bound) for rank in figures.memory}
    slow = tuple(rank for rank, per_s in sorted(paging.items()) if per_s >= least)
    if not slow:
        return None
    node = figures.node_of(slow[0])
    swapping = node is not None and (node.swap_in_bytes_per_s or 0.0) >= SWAP_BYTES_PER_S
    pressed = node is not None and (node.memory_pressure_percent or 0.0) >= PRESSURE_PERCENT
    if not (swapping or pressed or was_bound):
        return None  # reading a mapped file for the first time
    per_s = max(paging[rank] for rank in slow)
    text = f"{ranks_text(slow)} read {per_s:,.0f} pages a second back from disk or swap: the host's memory is too small"
    if node is not None and node.swap_in_bytes_per_s:
        text += f" (swap in {bytes_text(node.swap_in_bytes_per_s)}/s)"
    return Finding(
        "memory-bound",
        text,
        "warning",
        slow,
        "`zerotop plan` says what the run needs; offload less, or end what else uses memory.",
        {"major_faults_per_s": round(per_s, 1)},
    )


def find_gpu_fault(figures: Figures) -> Finding | None:
    """A GPU that the driver has lost, or whose memory is bad."""
    return _gpu_finding(figures, "GPU fault", "error", lambda concern: concern.severity == "error")


def find_throttled(figures: Figures) -> Finding | None:
    """GPUs that lower their clock because of heat or power. A GPU at its power limit at full load is not one: all large
    ones are (zerotop/state/gpu.py)."""
    return _gpu_finding(figures, "throttled", "warning", lambda concern: concern.word in THROTTLED)


def _gpu_finding(figures: Figures, what: What, severity: Severity, wanted: Callable[[Concern], bool]) -> Finding | None:
    if figures.state.state_name not in ("running", "stopping", "paused"):
        return None
    found = {
        rank: next((one for one in those if wanted(one)), None)
        for rank, those in sorted(concerns(figures.state).items())
        if figures.state.ranks[rank].goodbye is None
    }
    slow = {rank: concern for rank, concern in found.items() if concern is not None}
    if not slow:
        return None
    ranks = tuple(slow)
    concern = slow[ranks[0]]
    text = f"the GPU{'s' if len(slow) > 1 else ''} of {ranks_text(ranks)}: {concern.text}"
    advice = "`zerotop doctor` and `nvidia-smi -q -d PERFORMANCE,POWER,ECC` show all that the driver knows."
    return Finding(what, text, severity, ranks, advice, {"concern": concern.word})


def find_offload_bound(figures: Figures) -> Finding | None:
    """Steps wait for updates or copies on the host."""
    if figures.state.state_name != "running" or figures.warming_up or not figures.breakdowns:
        return None
    kept = figures.before is not None and figures.before.what == "offload-bound"
    share = figures.least_share("offload")
    if share < (KEPT_OFFLOAD_SHARE if kept else OFFLOAD_SHARE):
        return None
    ms = statistics.median(b.offload for b in figures.breakdowns.values())
    return Finding(
        "offload-bound",
        f"{ms_text(ms)} of each step ({share:.0%}) wait for offloaded updates and copies",
        "info",
        (),
        "A larger gradient_accumulation_steps hides more of them; a smaller offload_optimizer.ratio offloads less.",
        {"offload_ms": round(ms, 1), "offload_share": round(share, 3)},
    )
