"""Achieved TFLOPS and model FLOPs utilization (MFU), from a rank's tokens per second and its hello.

MFU = tokens/s x model FLOPs per token / peak FLOPs per second of the device (PaLM, arXiv 2204.02311, appendix B). HFU
also counts what activation checkpointing computes again. How the FLOPs are counted: runtime/plan/flops.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.wire.messages import Hello
from zerotop.format import MISSING, digits_text
from zerotop.state.run import RankState, RunState

RECENT_STEPS = 20


@dataclass(frozen=True)
class Efficiency:
    """Of one device, or the mean over several. `note` says where the peak comes from, or what is not known."""

    tflops: float | None = None
    """Model TFLOPS achieved: 10^12 FLOPs per second, without recomputation."""
    mfu: float | None = None
    """0..1"""
    hfu: float | None = None
    """0..1"""
    note: str = ""

    @property
    def text(self) -> str:
        """In a few words: "41.2% MFU, 408 TFLOPS", or why it is not known."""
        achieved = "" if self.tflops is None else f"{digits_text(self.tflops)} TFLOPS"
        if self.mfu is None:
            return f"{achieved}, MFU {MISSING}: {self.note}" if achieved else f"MFU {MISSING}: {self.note}"
        again = f" ({self.hfu:.1%} HFU)" if self.hfu is not None and self.hfu > self.mfu else ""
        return f"{self.mfu:.1%} MFU{again}, {achieved}"


def efficiency_of(hello: Hello | None, tokens_per_s: float | None) -> Efficiency:
    """Of one rank that trains so many tokens per second."""
    if hello is None:
        return Efficiency(note="the rank has not reported yet")
    model, hardware, peak = hello.model_flops_per_token, hello.hardware_flops_per_token, hello.peak_flops
    if not model:
        return Efficiency(note="the FLOPs of this model are not known")
    if not tokens_per_s:
        return Efficiency(note="the rank has reported no tokens per second")
    mfu = tokens_per_s * model / peak if peak else None
    hfu = tokens_per_s * hardware / peak if peak and hardware else None
    return Efficiency(tokens_per_s * model / 1e12, mfu, hfu, hello.peak_note)


def rank_efficiency(state: RunState, rank: RankState) -> Efficiency:
    """Of one rank over its recent steps; over its newest one if only that is known."""
    speed = rank.step.tokens_per_s if rank.step is not None else None
    if rank.rank == min(state.ranks):  # the series has the steps of the lowest rank
        recent = state.series.recent(RECENT_STEPS)
        known = [point.tokens_per_s for point in recent if point.rank == rank.rank and point.tokens_per_s]
        speed = statistics.median(known) if known else speed
    return efficiency_of(rank.hello, speed)


def run_efficiency(state: RunState) -> Efficiency:
    """The mean over the ranks; their devices may differ."""
    found = [rank_efficiency(state, rank) for _, rank in sorted(state.ranks.items())]
    if not found:
        return Efficiency(note="no rank has reported yet")
    return Efficiency(
        _mean([one.tflops for one in found]),
        _mean([one.mfu for one in found]),
        _mean([one.hfu for one in found]),
        next((one.note for one in found if one.mfu is None), found[0].note),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is not known: the mean of the others is not the run's."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) and known else None
