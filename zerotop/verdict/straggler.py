"""The rank for which the others wait, and what it takes longer for."""

from __future__ import annotations

import statistics
from typing import Any

from zerotop.format import ms_text
from zerotop.state.breakdown import Part
from zerotop.verdict.certainty import KEPT_CERTAINTY, KEPT_SHARE, KEPT_STEPS, certain_window, costs_time
from zerotop.verdict.figures import FAULTS_PER_S, Figures
from zerotop.verdict.finding import Finding, What
from zerotop.verdict.slow import DATA_SHARE, KEPT_CONTENTION_PERCENT, competitors, contended

PAIR_CERTAINTY = 1.2
"""Times the certainty where there are two ranks: one of them always waits for the other, and noise of the machine
affects one of them for longer."""
CAUSE_CERTAINTY = 0.5
"""Times the certainty for a rank with a cause of its own that noise of the steps does not make: it waits for a CPU, its
clock is lower, or it spends much of its steps on data."""
CLOCK_RATIO = 0.93
"""A GPU whose clock is below this share of the others' is slow for that reason."""
CONTENDED_RATIO = 1.5
"""Where all ranks wait for CPUs, first one and then another falls behind: a rank alone is to blame only if it takes so
much longer than the others."""
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

_PAGING: dict[Part, tuple[What, str]] = {
    "data": (
        "data starvation",
        "Its data do not stay in memory: read them in order, from a faster disk, or give the job more memory.",
    ),
    "compute": (
        "memory-bound",
        "What it computes with does not stay in memory: give the job more memory, or end what else uses it.",
    ),
}
"""What it is if the rank reads pages back from disk meanwhile."""


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
    if named in costs and costs_time(costs[named], window.step_ms, KEPT_STEPS, KEPT_SHARE, KEPT_CERTAINTY):
        rank, steps = named, certain_window(costs[named], window.step_ms, 1.0) or KEPT_STEPS
    else:
        rank = max(costs, key=lambda number: sum(costs[number][-KEPT_STEPS:]))
        strictness = PAIR_CERTAINTY if len(costs) == 2 else 1.0
        if _has_cause(figures, rank):
            strictness *= CAUSE_CERTAINTY
        found = certain_window(costs[rank], window.step_ms, strictness)
        if found is None:
            return None
        steps = found
    assert rank is not None
    over = figures.over(steps)
    return None if _is_contentions_noise(over, rank) else _straggler(over, rank)


def _has_cause(figures: Figures, rank: int) -> bool:
    """Whether something that is measured by itself makes the rank slow."""
    if contended(figures, rank) is not None or _slow_clock(figures, rank) is not None:
        return True
    shares = {number: figures.state.breakdowns.lasting_share(number, "data") for number in figures.breakdowns}
    others = [share for number, share in shares.items() if number != rank]
    return bool(others) and shares.get(rank, 0.0) - statistics.median(others) >= DATA_SHARE


def _is_contentions_noise(figures: Figures, rank: int) -> bool:
    """Whether the rank is behind only because all ranks compete for the CPUs, and somebody has to be."""
    delays = figures.run_delay_percent
    if not delays or max(statistics.fmean(delays.values()), figures.long_delay_percent) < KEPT_CONTENTION_PERCENT:
        return False
    if contended(figures, rank) is not None:
        return False
    part, _, ratio = _excess(figures, rank)
    if part == "compute":
        return ratio is None or ratio < CONTENDED_RATIO
    return part not in ("data", "offload", "control")


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
            times = now / usual
            text += (
                f" and {times:,.0f} x what it took before" if times >= 10 else f" and {times:.2f} x what it took before"
            )
            facts["usual_ms"] = round(usual, 1)
    if counted:
        text += f"; it came last in {came_last} of {counted} collectives"
    if part in _PAGING and (faults_per_s := figures.page_faults_per_s(rank)) >= FAULTS_PER_S:
        text += f"; it reads {faults_per_s:,.0f} pages a second of mapped files from disk"
        facts["major_faults_per_s"] = round(faults_per_s, 1)
        what, advice = _PAGING[part]
    if clock := _slow_clock(figures, rank):
        text += f"; {clock[0]}"
        facts |= clock[1]
        advice = "Look at the GPU's cooling and power: `nvidia-smi -q -d PERFORMANCE,POWER`."
    elif (delay := contended(figures, rank)) is not None:
        what, cause = "contention", competitors(figures, rank)
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
