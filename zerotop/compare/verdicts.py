"""Whether one run is better than another, and how sure that is.

[Note: noise]
The losses of two runs at the same step share what the data of that step does to them, so their differences are
compared, not the losses. Neighbouring differences are alike, so they count less than their number says: the last common
steps are cut into BLOCKS blocks, and the spread of the blocks' means is the noise. A difference is real if it is larger
than what Student's t allows at 99%, and larger than the tolerance, below which nobody would care.
Step times have no such pairs: there the blocks of each run's own last steps have medians, whose spread is its noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zerotop.compare.curves import RunCurves
from zerotop.format import bytes_text, figure_text, ms_text, rate_text

Judgement = Literal["better", "worse", "within noise", "unknown"]
BLOCKS = 8
LEAST_STEPS = 16
"""With fewer common steps nothing is said about the loss."""
TAIL_SHARE, TAIL_LEAST = 0.25, 64
"""The last quarter of the common steps is compared, at least so many of them."""
WARM_UP_STEPS = 3
SPEED_STEPS = 400
_STUDENT_99 = {2: 9.92, 3: 5.84, 4: 4.60, 5: 4.03, 6: 3.71, 7: 3.50}
"""Two-sided 99% by degrees of freedom. https://www.itl.nist.gov/div898/handbook/eda/section3/eda3672.htm"""
TOLERANCES = {"loss": 0.002, "speed": 0.02, "memory": 0.02}
"""Relative differences that are never called better or worse."""
FIGURES = tuple(TOLERANCES)


@dataclass(frozen=True)
class Verdict:
    """How run B does beside run A in one figure. change: relative, of B to A; noise: how much of it may be chance."""

    figure: str
    judgement: Judgement
    a: float | None
    b: float | None
    change: float | None
    noise: float | None
    text: str

    def document(self) -> dict[str, object]:
        """As JSON."""
        return {
            "judgement": self.judgement,
            "a": self.a,
            "b": self.b,
            "change": self.change,
            "noise": self.noise,
            "text": self.text,
        }


def judge(a: RunCurves, b: RunCurves, tolerances: dict[str, float] | None = None) -> dict[str, Verdict]:
    """Figure -> its verdict. tolerances: of TOLERANCES, those that differ."""
    allowed = TOLERANCES | (tolerances or {})
    return {
        "loss": judge_loss(a, b, allowed["loss"]),
        "speed": judge_speed(a, b, allowed["speed"]),
        "memory": judge_memory(a, b, allowed["memory"]),
    }


def overall(verdicts: Sequence[Verdict]) -> Judgement:
    """Worse if one is worse, else unknown if one is unknown, else better if one is better."""
    found = {verdict.judgement for verdict in verdicts}
    order: tuple[Judgement, ...] = ("worse", "unknown", "better")
    return next((one for one in order if one in found), "within noise")


def common_steps(a: RunCurves, b: RunCurves) -> list[tuple[int, float, float]]:
    """(step, loss of A, loss of B) of the steps that both have taken, without those that they share as one trunk."""
    trunk = max([0, *(run.branch_step or 0 for run in (a, b) if run.branch_of in (a.name, b.name))])
    losses = {point.step: point.loss for point in a.points if _usable(point.loss)}
    found = []
    for point in b.points:
        other = losses.get(point.step)
        if point.step > trunk and other is not None and point.loss is not None and _usable(point.loss):
            found.append((point.step, other, point.loss))
    return found


def judge_loss(a: RunCurves, b: RunCurves, tolerance: float) -> Verdict:
    """See [Note: noise]."""
    common = common_steps(a, b)
    lost = [
        run.name
        for run in (a, b)
        if run.points and run.points[-1].loss is not None and not _usable(run.points[-1].loss)
    ]
    if lost and len(lost) == 1:
        judgement: Judgement = "worse" if lost[0] == b.name else "better"
        return Verdict("loss", judgement, None, None, None, None, f"loss: that of {lost[0]} is not a finite number")
    if len(common) < LEAST_STEPS:
        text = f"loss: {len(common)} common steps are too few to compare, {LEAST_STEPS} are needed"
        return Verdict("loss", "unknown", None, None, None, None, text)
    tail = common[-max(TAIL_LEAST, int(len(common) * TAIL_SHARE)) :]
    mean_a = statistics.fmean(loss for _, loss, _ in tail)
    mean_b = statistics.fmean(loss for _, _, loss in tail)
    noise = _noise([statistics.fmean(block) for block in _blocks([other - loss for _, loss, other in tail])])
    judgement = _judged(mean_b - mean_a, max(noise, tolerance * abs(mean_a)), less_is_better=True)
    where = f"over the last {len(tail)} common steps ({tail[0][0]} to {tail[-1][0]})"
    text = f"loss {figure_text(mean_a)} -> {figure_text(mean_b)}{_tail(judgement, mean_b, mean_a, noise)} {where}"
    scale = abs(mean_a) or 1.0
    return Verdict("loss", judgement, mean_a, mean_b, (mean_b - mean_a) / scale, noise / scale, text)


def judge_speed(a: RunCurves, b: RunCurves, tolerance: float) -> Verdict:
    """Tokens per second where both runs know them, else the step time."""
    runs = [[point for point in run.points if point.step > (run.branch_step or 0)] for run in (a, b)]
    runs = [points[WARM_UP_STEPS:][-SPEED_STEPS:] for points in runs]
    if min(len(points) for points in runs) < LEAST_STEPS:
        text = f"speed: one of the runs has taken fewer than {LEAST_STEPS + WARM_UP_STEPS} steps"
        return Verdict("speed", "unknown", None, None, None, None, text)
    tokens = all(point.tokens_per_s is not None for points in runs for point in points)
    values = [[point.tokens_per_s or 0.0 if tokens else point.step_ms for point in points] for points in runs]
    of_a, of_b = (statistics.median(one) for one in values)
    spreads = [_noise([statistics.median(block) for block in _blocks(one)]) for one in values]
    noise = math.hypot(*spreads)
    judgement = _judged(of_b - of_a, max(noise, tolerance * abs(of_a)), less_is_better=not tokens)
    write = rate_text if tokens else ms_text
    what = "speed" if tokens else "step time"
    text = f"{what} {write(of_a)} -> {write(of_b)}{_tail(judgement, of_b, of_a, noise)}"
    scale = abs(of_a) or 1.0
    return Verdict("speed", judgement, of_a, of_b, (of_b - of_a) / scale, noise / scale, text)


def judge_memory(a: RunCurves, b: RunCurves, tolerance: float) -> Verdict:
    """The peak of the rank that takes most."""
    if a.peak_bytes is None or b.peak_bytes is None or a.peak_of != b.peak_of:
        why = "one run is on a GPU, the other is not" if a.peak_of != b.peak_of else "a run has reported none yet"
        return Verdict("memory", "unknown", a.peak_bytes, b.peak_bytes, None, None, f"memory: {why}")
    change = b.peak_bytes - a.peak_bytes
    judgement = _judged(change, tolerance * a.peak_bytes, less_is_better=True)
    texts = f"{bytes_text(a.peak_bytes)} -> {bytes_text(b.peak_bytes)}"
    text = f"peak memory of a rank ({a.peak_of}) {texts}{_tail(judgement, b.peak_bytes, a.peak_bytes, None)}"
    return Verdict("memory", judgement, a.peak_bytes, b.peak_bytes, change / a.peak_bytes, None, text)


def _usable(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _judged(change: float, allowed: float, *, less_is_better: bool) -> Judgement:
    if abs(change) <= allowed:
        return "within noise"
    return "better" if (change < 0) == less_is_better else "worse"


def _tail(judgement: Judgement, now: float, before: float, noise: float | None) -> str:
    share = (now - before) / (abs(before) or 1.0)
    about = f", noise {noise / (abs(before) or 1.0):.1%}" if noise is not None else ""
    return f": {judgement} ({share:+.1%}{about})"


def _blocks(values: Sequence[float]) -> list[Sequence[float]]:
    size = max(1, len(values) // BLOCKS)
    return [values[at * size : (at + 1) * size] for at in range(min(BLOCKS, len(values)))]


def _noise(means: Sequence[float]) -> float:
    """What the mean of the blocks may be off by, at 99%."""
    if len(means) < 3:
        return math.inf
    student = _STUDENT_99.get(len(means) - 1, max(_STUDENT_99.values()))
    return student * statistics.stdev(means) / math.sqrt(len(means))
