"""What limits the run: memory, heat and power, offload."""

from __future__ import annotations

import statistics

from zerotop.format import bytes_text, ms_text
from zerotop.state.stall import ranks_text
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding

FAULTS_PER_S, KEPT_FAULTS_PER_S = 100.0, 20.0
"""Page faults per second that had to read from disk or swap: a process that has its pages has none."""
SWAP_BYTES_PER_S = 2.0**20
PRESSURE_PERCENT = 10.0
OFFLOAD_SHARE, KEPT_OFFLOAD_SHARE = 0.25, 0.18
HOT_CLOCK = 0.9
"""A GPU that is throttled to less than this share of its maximum clock is slow for that reason."""
HARMLESS_REASONS = frozenset({"sync boost"})


def find_memory_bound(figures: Figures) -> Finding | None:
    """Memory is so short that the allocator frees its cache again and again, or pages are read back from disk."""
    if figures.state.state_name != "running":
        return None
    kept = figures.before is not None and figures.before.what == "memory-bound"
    retried = {r: now.alloc_retries - was.alloc_retries for r, (now, was) in figures.memory.items()}
    worst = max(retried, key=lambda rank: retried[rank], default=None)
    if worst is not None and retried[worst] > 0:
        span = figures.memory[worst][0].at_s - figures.memory[worst][1].at_s
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
    least = KEPT_FAULTS_PER_S if kept else FAULTS_PER_S
    paging = {
        r: (now.major_faults - was.major_faults) / (now.at_s - was.at_s)
        for r, (now, was) in figures.memory.items()
        if now.at_s - was.at_s >= 5
    }
    slow = tuple(rank for rank, per_s in sorted(paging.items()) if per_s >= least)
    if not slow:
        return None
    node = figures.node_of(slow[0])
    swapping = node is not None and (node.swap_in_bytes_per_s or 0.0) >= SWAP_BYTES_PER_S
    pressed = node is not None and (node.memory_pressure_percent or 0.0) >= PRESSURE_PERCENT
    if not (swapping or pressed or kept):
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


def find_throttled(figures: Figures) -> Finding | None:
    """GPUs that lower their clock because of heat or power."""
    if figures.state.state_name != "running":
        return None
    slow: dict[int, str] = {}
    lowest = 1.0
    for rank in figures.present:
        gpu = figures.gpu_of(rank.rank)
        if gpu is None or not gpu.sm_clock_mhz or not gpu.max_sm_clock_mhz:
            continue
        reasons = [reason for reason in gpu.clock_reasons if reason not in HARMLESS_REASONS]
        ratio = gpu.sm_clock_mhz / gpu.max_sm_clock_mhz
        if reasons and ratio < HOT_CLOCK:
            facts = [f"{gpu.sm_clock_mhz:,.0f} of {gpu.max_sm_clock_mhz:,.0f} MHz", *reasons]
            facts += [f"{gpu.temperature_c:.0f} °C"] if gpu.temperature_c is not None else []
            if gpu.power_w is not None and gpu.power_limit_w is not None:
                facts.append(f"{gpu.power_w:.0f} of {gpu.power_limit_w:.0f} W")
            slow[rank.rank] = ", ".join(facts)
            lowest = min(lowest, ratio)
    if not slow:
        return None
    ranks = tuple(slow)
    return Finding(
        "throttled",
        f"the GPU{'s' if len(slow) > 1 else ''} of {ranks_text(ranks)} {'run' if len(slow) > 1 else 'runs'} below "
        f"{'their' if len(slow) > 1 else 'its'} clock: {slow[ranks[0]]}",
        "warning",
        ranks,
        "Look at cooling and power: `nvidia-smi -q -d PERFORMANCE,POWER`.",
        {"clock_ratio": round(lowest, 3)},
    )


def find_offload_bound(figures: Figures) -> Finding | None:
    """Steps wait for updates or copies on the host."""
    if figures.state.state_name != "running" or figures.warming_up or not figures.breakdowns:
        return None
    kept = figures.before is not None and figures.before.what == "offload-bound"
    share = figures.median_share("offload")
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
