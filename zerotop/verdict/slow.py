"""Runs that are slower than they could be, because of the machine, the link between ranks, or the data."""

from __future__ import annotations

import statistics

from zerotop.format import bytes_text, ms_text
from zerotop.verdict.certainty import KEPT_CERTAINTY, KEPT_STEPS, LEAST_STEPS, certain_window, costs_time
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding, What

CONTENTION_PERCENT, KEPT_CONTENTION_PERCENT = 30.0, 15.0
"""A rank that waits for a CPU for this share of the time is held up by other processes or threads..."""
BEYOND_PERCENT, KEPT_BEYOND_PERCENT = 20.0, 8.0
"""...and alone is, if it waits for so much more of the time than the others."""
LINK_RATIO, KEPT_LINK_RATIO = 1.6, 1.3
"""Transfers that take this many times what they took at first..."""
LINK_SHARE = 0.08
"""...and cost at least this share of the step are slow."""
DATA_SHARE, KEPT_DATA_SHARE = 0.20, 0.12
"""Steps that spend this share outside the engine wait for data."""


# ---- the machine -------------------------------------------------------------------------------------------------
def contended(figures: Figures, rank: int) -> float | None:
    """The share of the time in percent for which the rank waits for a CPU, if that is much, and clearly more than
    others do."""
    mine = figures.run_delay_percent.get(rank)
    if mine is None:
        return None
    others = [percent for number, percent in figures.run_delay_percent.items() if number != rank]
    usual = statistics.median(others) if others else 0.0
    if _was(figures, "contention") and figures.before is not None and figures.before.ranks == (rank,):
        return mine if mine >= KEPT_CONTENTION_PERCENT and mine - usual >= KEPT_BEYOND_PERCENT else None
    return mine if mine >= CONTENTION_PERCENT and mine - usual >= BEYOND_PERCENT else None


def find_contention(figures: Figures) -> Finding | None:
    """Ranks wait for a free CPU: one of them, all, or in turns."""
    delays = figures.run_delay_percent
    if figures.state.state_name != "running" or figures.warming_up or not delays or not figures.expected:
        return None
    before = figures.before.ranks if figures.before is not None and _was(figures, "contention") else ()
    rank = before[0] if before and before[0] in delays else max(delays, key=lambda number: delays[number])
    alone = contended(figures, rank)
    mean = statistics.fmean(delays.values())
    if _was(figures, "contention"):
        mean = max(mean, figures.long_delay_percent)
    least = KEPT_CONTENTION_PERCENT if _was(figures, "contention") else CONTENTION_PERCENT
    if mean < least and not (before and alone is not None):
        return None
    node = figures.node_of(rank)
    load = f" (load {node.load_1m:.1f} on {node.cpu_count} CPUs)" if node is not None else ""
    who, percent = (f"rank {rank} waits", alone) if alone is not None else ("the ranks wait", mean)
    return Finding(
        "contention",
        f"{who} for a free CPU {percent:.0f}% of the time{load}{competitors(figures, rank)}",
        "warning",
        (rank,) if alone is not None else (),
        "Move the other processes elsewhere, or lower the ranks' threads (OMP_NUM_THREADS, num_workers).",
        {"run_delay_percent": round(percent, 1)},
        cost=percent / 100,
    )


def competitors(figures: Figures, rank: int) -> str:
    node = figures.node_of(rank)
    if node is None or not node.busy:
        return ""
    names = ", ".join(f"{one.name} (pid {one.pid}) {one.cpu_percent:.0f}%" for one in node.busy)
    return f"; busiest outside the run: {names}"


# ---- the link ----------------------------------------------------------------------------------------------------
def find_slow_link(figures: Figures) -> Finding | None:
    """Transfers that take longer than the same ones did before, while the ranks arrive together, and that computing
    does not hide."""
    if figures.state.state_name != "running" or figures.warming_up or not figures.breakdowns:
        return None
    kept = _was(figures, "slow link")
    costs = figures.state.waits.transfer_excess_ms()
    step_ms = figures.over(LEAST_STEPS).step_ms
    if step_ms <= 0:
        return None
    stays = kept and costs_time(costs, step_ms, KEPT_STEPS, LINK_SHARE / 2, KEPT_CERTAINTY)
    if not stays and certain_window(costs, step_ms, 1.0, LINK_SHARE) is None:
        return None
    slow = [
        kind
        for kind in figures.state.waits.bandwidth.kinds()
        if (usual := kind.usual_us) and (now := kind.now_us) and now > (KEPT_LINK_RATIO if kept else LINK_RATIO) * usual
    ]
    if not slow:
        return None
    world = figures.state.world_size
    kind = max(slow, key=lambda one: one.bytes * one.count)
    usual, now = kind.usual_us or 0.0, kind.now_us or 0.0
    cost = statistics.fmean(costs[-LEAST_STEPS:])
    rate, best = kind.bus_bytes_per_s(now, world), kind.bus_bytes_per_s(kind.best_us, world)
    # The name of the only group would say nothing.
    group = kind.group if len(figures.state.waits.groups) > 1 else ""
    size = f" of {bytes_text(kind.bytes)}" if kind.bytes else ""
    text = (
        f"transfers take {ms_text(cost)} a step ({cost / step_ms:.0%}) more than they did: {kind.op}"
        f"{size}{f' in group {group}' if group else ''} {ms_text(now / 1000)}, "
        f"before {ms_text(usual / 1000)}"
    )
    if rate and best:
        text += f" ({bytes_text(rate)}/s, best {bytes_text(best)}/s)"
    return Finding(
        "slow link",
        text,
        "warning",
        (),
        "Look for other traffic on the network or PCIe, link errors, and a process that shares the link.",
        {
            "op": kind.op,
            "bytes": kind.bytes,
            **({"group": group} if group else {}),
            "usual_us": round(usual),
            "now_us": round(now),
            "cost_ms": round(cost, 1),
            "bus_bytes_per_s": round(rate) if rate else None,
            "best_bus_bytes_per_s": round(best) if best else None,
        },
        cost=cost / step_ms,
    )


# ---- data --------------------------------------------------------------------------------------------------------
def find_data_starvation(figures: Figures) -> Finding | None:
    """All ranks spend much of the step outside the engine, which is where data is loaded."""
    if figures.state.state_name != "running" or figures.warming_up or not figures.breakdowns:
        return None
    if min(figures.state.breakdowns.steps(rank) for rank in figures.breakdowns) < LEAST_STEPS:
        return None
    share = figures.least_share("data")
    if share < (KEPT_DATA_SHARE if _was(figures, "data starvation") else DATA_SHARE):
        return None
    data_ms = statistics.median(b.data for b in figures.breakdowns.values())
    return Finding(
        "data starvation",
        f"{ms_text(data_ms)} of each step ({share:.0%}) pass outside forward, backward and step, in data loading or "
        "the script's own code, on all ranks",
        "warning",
        (),
        "Raise num_workers and prefetching, prepare the data beforehand, or move work out of the training loop.",
        {"data_ms": round(data_ms, 1), "data_share": round(share, 3)},
        cost=share,
    )


def _was(figures: Figures, what: What) -> bool:
    return figures.before is not None and figures.before.what == what
