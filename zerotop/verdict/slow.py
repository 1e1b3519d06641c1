"""Runs that are slower than they could be, because of one rank, the link between ranks, or the machine."""

from __future__ import annotations

import math
import statistics
from typing import Any

from zerotop.format import bytes_text, ms_text
from zerotop.state.breakdown import Part
from zerotop.verdict.figures import Figures
from zerotop.verdict.finding import Finding, What

WINDOWS: tuple[tuple[int, float, float], ...] = (
    (4, 0.25, 16.0),
    (8, 0.30, 5.5),
    (8, 0.10, 9.0),
    (16, 0.05, 9.0),
    (40, 0.05, 7.0),
)
"""(steps, share, certainty): a rank is named if over the newest `steps` it costs each other rank more than this share
of the step, net of what they cost it, and the mean of that is `certainty` times its standard error. Where ranks take
turns none is named, however much they wait in total, nor is a rank for one long pause. Few steps need a large and
steady cost, so that a bad fault is named within seconds, and noise is not."""
PAIR_CERTAINTY = 1.2
"""Times the certainty where there are two ranks: one of them always waits for the other, and noise of the machine
affects one of them for longer."""
CAUSE_CERTAINTY = 0.5
"""Times the certainty for a rank with a cause of its own that noise of the steps does not make: it waits for a CPU, its
clock is lower, or it spends much of its steps on data."""
LEAST_STEPS = 8
"""Fewer steps give no verdict on all ranks together."""
KEPT_STEPS, KEPT_SHARE, KEPT_CERTAINTY = 16, 0.025, 2.0
"""Limits for what is the verdict already: it must not come and go at every step."""

CONTENTION_PERCENT, KEPT_CONTENTION_PERCENT = 30.0, 15.0
"""A rank that waits for a CPU for this share of the time is held up by other processes or threads..."""
BEYOND_PERCENT, KEPT_BEYOND_PERCENT = 20.0, 8.0
"""...and alone is, if it waits for so much more of the time than the others."""
CLOCK_RATIO = 0.93
"""A GPU whose clock is below this share of the others' is slow for that reason."""
CONTENDED_RATIO = 1.5
"""Where all ranks wait for CPUs, first one and then another falls behind: a rank alone is to blame only if it takes so
much longer than the others."""
LINK_RATIO, KEPT_LINK_RATIO = 1.6, 1.3
"""Transfers that take this many times what they took at first..."""
LINK_SHARE = 0.08
"""...and cost at least this share of the step are slow."""
DATA_SHARE, KEPT_DATA_SHARE = 0.20, 0.12
"""Steps that spend this share outside the engine wait for data."""

_STRAGGLES: dict[Part, tuple[What, str, str]] = {
    "compute": (
        "straggler",
        "its forward and backward take",
        "Compare its batches (lengths), its GPU (`zerotop doctor`) and its node with the others'.",
    ),
    "data": (
        "data starvation",
        "its data loading, or the script's own code between two steps, takes",
        "Look at its loader: num_workers, prefetching, the file system of its shard.",
    ),
    "offload": (
        "offload-bound",
        "its updates and copies on the host take",
        "Compare the CPU and memory of its node with the others'.",
    ),
    "optimizer": ("straggler", "its optimizer takes", "Compare the CPU of its node with the others'."),
    "transfer": ("straggler", "its part of the collectives takes", "Compare the CPU of its node with the others'."),
    "control": ("straggler", "its checkpoints and evaluations take", "Only one rank may be doing them: let all do so."),
    "waiting": ("straggler", "it waits", ""),
}


def find_straggler(figures: Figures) -> Finding | None:
    """The rank for which the others wait in the recent steps, and why; None if ranks take turns or the cost is small.

    What counts is time, not the number of collectives in which a rank came last: a small skew at the end of a step
    counts as often as the long wait before it.
    """
    state, window, costs = figures.state, figures.window, figures.state.waits.net_cost_ms()
    if state.state_name != "running" or figures.warming_up or not window.step_ms or not costs:
        return None
    before = figures.before
    named = before.ranks[0] if before is not None and len(before.ranks) == 1 and before.severity == "warning" else None
    if named in costs and _costs_time(costs[named], window.step_ms, KEPT_STEPS, KEPT_SHARE, KEPT_CERTAINTY):
        rank, steps = named, _window(costs[named], window.step_ms, 1.0) or KEPT_STEPS
    else:
        rank = max(costs, key=lambda number: sum(costs[number][-KEPT_STEPS:]))
        strictness = PAIR_CERTAINTY if len(costs) == 2 else 1.0
        if _has_cause(figures, rank):
            strictness *= CAUSE_CERTAINTY
        found = _window(costs[rank], window.step_ms, strictness)
        if found is None:
            return None
        steps = found
    assert rank is not None
    over = figures.over(steps)
    return None if _is_contentions_noise(over, rank) else _straggler(over, rank)


def _has_cause(figures: Figures, rank: int) -> bool:
    """Whether something that is measured by itself makes the rank slow."""
    if _contended(figures, rank) is not None or _slow_clock(figures, rank) is not None:
        return True
    shares = {number: figures.state.breakdowns.lasting_share(number, "data") for number in figures.breakdowns}
    others = [share for number, share in shares.items() if number != rank]
    return bool(others) and shares.get(rank, 0.0) - statistics.median(others) >= DATA_SHARE


def _is_contentions_noise(figures: Figures, rank: int) -> bool:
    """Whether the rank is behind only because all ranks compete for the CPUs, and somebody has to be."""
    delays = figures.run_delay_percent
    if not delays or max(statistics.fmean(delays.values()), figures.long_delay_percent) < KEPT_CONTENTION_PERCENT:
        return False
    if _contended(figures, rank) is not None:
        return False
    part, _, ratio = _excess(figures, rank)
    if part == "compute":
        return ratio is None or ratio < CONTENDED_RATIO
    return part not in ("data", "offload", "control")


def _window(cost_ms: list[float], step_ms: float, strictness: float, least_share: float = 0.0) -> int | None:
    """The shortest of WINDOWS over which these costs, one per step, are neither small nor chance."""
    for steps, share, certainty in WINDOWS:
        if _costs_time(cost_ms, step_ms, steps, max(share, least_share), strictness * certainty):
            return steps
    return None


def _costs_time(cost_ms: list[float], step_ms: float, steps: int, share: float, certainty: float) -> bool:
    """Whether the newest costs are on average above `share` of a step and `certainty` standard errors."""
    newest = cost_ms[-steps:]
    if len(newest) < (min(steps, LEAST_STEPS) if certainty > KEPT_CERTAINTY else WINDOWS[0][0]):
        return False
    mean = statistics.fmean(newest)
    # statistics.stdev computes in fractions, at fifty times the time.
    deviation = math.sqrt(math.fsum((cost - mean) ** 2 for cost in newest) / (len(newest) - 1))
    error = deviation / math.sqrt(len(newest))
    recent = statistics.fmean(newest[-LEAST_STEPS:])
    return min(mean, recent) > share * step_ms and mean >= certainty * error


def _straggler(figures: Figures, rank: int) -> Finding:
    window = figures.window
    wait_ms, came_last = window.caused_ms.get(rank, 0.0), window.came_last.get(rank, 0)
    counted = sum(window.came_last.values())
    facts: dict[str, Any] = {
        "others_wait_ms": round(wait_ms, 1),
        "others_wait_share": round(wait_ms / window.step_ms, 3),
        "came_last": came_last,
        "collectives": counted,
        "steps": window.steps,
    }
    part, excess_ms, ratio = _excess(figures, rank)
    what, takes, advice = _STRAGGLES[part] if part is not None else ("straggler", "", _STRAGGLES["compute"][2])
    text = f"the others wait for rank {rank}, {ms_text(wait_ms)} a step ({wait_ms / window.step_ms:.0%})"
    if part is not None:
        text += f": {takes} {ms_text(excess_ms)} longer than theirs"
        text += f" ({ratio:.2f} x)" if ratio is not None else ""
        facts |= {"part": part, "excess_ms": round(excess_ms, 1), "ratio": round(ratio, 3) if ratio else None}
        usual, now = figures.state.breakdowns.usual_ms(rank, part), getattr(figures.breakdowns[rank], part)
        if usual and now > 1.2 * usual:
            text += f" and {now / usual:.2f} x what it took before"
            facts["usual_ms"] = round(usual, 1)
    if counted:
        text += f"; it came last in {came_last} of {counted} collectives"
    if clock := _slow_clock(figures, rank):
        text += f"; {clock[0]}"
        facts |= clock[1]
        advice = "Look at the GPU's cooling and power: `nvidia-smi -q -d PERFORMANCE,POWER`."
    elif (delay := _contended(figures, rank)) is not None:
        what, cause = "contention", _competitors(figures, rank)
        text += f"; it waited for a free CPU {delay:.0f}% of the time{cause}"
        facts |= {"run_delay_percent": round(delay, 1)}
        advice = "Move the other processes elsewhere, or give the ranks CPUs of their own."
    return Finding(what, text, "warning", (rank,), advice, facts, cost=wait_ms / window.step_ms)


def _excess(figures: Figures, rank: int) -> tuple[Part | None, float, float | None]:
    """The part of the step that takes the rank the most time beyond the others' median: (part, ms, ratio)."""
    mine = figures.breakdowns.get(rank)
    if mine is None:
        return None, 0.0, None
    excess: dict[Part, float] = {}
    for part, value in mine.parts().items():
        others = figures.others_ms(rank, part)
        if others is not None and part != "waiting":
            excess[part] = value - others
    if not excess:
        return None, 0.0, None
    part = max(excess, key=lambda one: excess[one])
    if excess[part] <= 0:
        return None, 0.0, None
    others = figures.others_ms(rank, part) or 0.0
    return part, excess[part], getattr(mine, part) / others if others > 0.05 * excess[part] else None


def _slow_clock(figures: Figures, rank: int) -> tuple[str, dict[str, Any]] | None:
    """The rank's GPU runs at a lower clock than the others'."""
    gpu = figures.gpu_of(rank)
    others = [g.sm_clock_mhz for n in figures.state.ranks if n != rank and (g := figures.gpu_of(n)) and g.sm_clock_mhz]
    if gpu is None or not gpu.sm_clock_mhz or not others:
        return None
    median = statistics.median(others)
    if gpu.sm_clock_mhz >= CLOCK_RATIO * median:
        return None
    why = f": {', '.join(gpu.clock_reasons)}" if gpu.clock_reasons else ""
    return (
        f"its SM clock is {gpu.sm_clock_mhz:,.0f} MHz, the others' {median:,.0f}{why}",
        {"sm_clock_mhz": gpu.sm_clock_mhz, "others_sm_clock_mhz": median, "clock_reasons": list(gpu.clock_reasons)},
    )


# ---- the machine -------------------------------------------------------------------------------------------------
def _contended(figures: Figures, rank: int) -> float | None:
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
    alone = _contended(figures, rank)
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
        f"{who} for a free CPU {percent:.0f}% of the time{load}{_competitors(figures, rank)}",
        "warning",
        (rank,) if alone is not None else (),
        "Move the other processes elsewhere, or lower the ranks' threads (OMP_NUM_THREADS, num_workers).",
        {"run_delay_percent": round(percent, 1)},
        cost=percent / 100,
    )


def _competitors(figures: Figures, rank: int) -> str:
    node = figures.node_of(rank)
    if node is None or not node.busy:
        return ""
    names = ", ".join(f"{one.name} (pid {one.pid}) {one.cpu_percent:.0f}%" for one in node.busy)
    return f"; busiest outside the run: {names}"


# ---- the link ----------------------------------------------------------------------------------------------------
def find_slow_link(figures: Figures) -> Finding | None:
    """Transfers that take longer than the same ones did before, while the ranks arrive together."""
    if figures.state.state_name != "running" or figures.warming_up or not figures.breakdowns:
        return None
    kept = _was(figures, "slow link")
    costs = figures.state.waits.transfer_excess_ms()
    step_ms = figures.over(LEAST_STEPS).step_ms
    if step_ms <= 0:
        return None
    stays = kept and _costs_time(costs, step_ms, KEPT_STEPS, LINK_SHARE / 2, KEPT_CERTAINTY)
    if not stays and _window(costs, step_ms, 1.0, LINK_SHARE) is None:
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
    text = (
        f"transfers take {ms_text(cost)} a step ({cost / step_ms:.0%}) more than they did: {kind.op} of "
        f"{bytes_text(kind.bytes)} {ms_text(now / 1000)}, before {ms_text(usual / 1000)}"
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
        f"{ms_text(data_ms)} of each step ({share:.0%}) pass outside the engine, in data loading or the script's own "
        "code, on all ranks",
        "warning",
        (),
        "Raise num_workers and prefetching, prepare the data beforehand, or move work out of the training loop.",
        {"data_ms": round(data_ms, 1), "data_share": round(share, 3)},
        cost=share,
    )


def _was(figures: Figures, what: What) -> bool:
    return figures.before is not None and figures.before.what == what
