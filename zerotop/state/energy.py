"""Energy per step and per token, from differences of the GPUs' energy counters.

[Note: which energy belongs to which steps]
A step's end and a sample of the probe carry the monotonic clock of their node, so on the node of the rank that the
series comes from, the counters are interpolated to the ends of two steps. Clocks of different nodes are never compared:
on the other nodes the same ages are taken, counted back from their newest samples, which is right to within the probe's
second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from runtime.wire.messages import StepResult
from runtime.wire.node import NodeStats
from zerotop.state.series import Series

WINDOW_S = 60.0
"""The steps of this time are averaged; two steps at least, however long they take."""
SPACING_S = 10.0
SAMPLES_KEPT = 120


@dataclass(frozen=True)
class EnergyUse:
    """The energy that all GPUs of the run took, averaged over the last steps; what lies between the steps (pauses,
    checkpoints) is counted too."""

    joules_per_step: float
    joules_per_million_tokens: float | None
    power_w: float


class Energy:
    """The energy counters of each node: samples at least SPACING_S apart, and the newest."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[NodeStats]] = {}
        self._newest: dict[str, NodeStats] = {}

    def add(self, stats: NodeStats) -> None:
        """Take a sample of a node. Counters that have started again start the history again."""
        before = self._newest.get(stats.host)
        if not _counters(stats):
            return
        kept = self._kept.setdefault(stats.host, deque(maxlen=SAMPLES_KEPT))
        if before is not None and not _continues(before, stats):
            kept.clear()
        if not kept or stats.at_ns - kept[-1].at_ns >= SPACING_S * 1e9:
            kept.append(stats)
        self._newest[stats.host] = stats

    def copy(self) -> Energy:
        """An independent copy."""
        other = Energy()
        other._kept = {host: deque(kept, maxlen=SAMPLES_KEPT) for host, kept in self._kept.items()}
        other._newest = dict(self._newest)
        return other

    def messages(self) -> list[NodeStats]:
        """One older sample of each node: with the newest, all that a late screen needs."""
        found = []
        for host, kept in self._kept.items():
            newest_ns = self._newest[host].at_ns
            old = [stats for stats in kept if newest_ns - stats.at_ns >= WINDOW_S * 1e9]
            older = old[-1] if old else kept[0]
            if older.at_ns < newest_ns:
                found.append(older)
        return found

    def span_ns(self, host: str) -> tuple[int, int] | None:
        """From the oldest to the newest sample of a node, on its clock."""
        return (self._kept[host][0].at_ns, self._newest[host].at_ns) if host in self._newest else None

    def joules(self, host: str, uuids: frozenset[str], ages_s: tuple[float, float]) -> float | None:
        """What these GPUs of a node took between two moments, which are given as ages before its newest sample."""
        if host not in self._newest:
            return None
        newest = self._newest[host]
        samples = [*self._kept[host], newest] if newest is not self._kept[host][-1] else [*self._kept[host]]
        at = [_total_at(samples, uuids, newest.at_ns - age_s * 1e9) for age_s in ages_s]
        return at[1] - at[0] if at[0] is not None and at[1] is not None else None


def energy_use(
    energy: Energy, series: Series, gpus: dict[str, frozenset[str]], host: str, tokens_per_step: float | None
) -> EnergyUse | None:
    """`gpus`: node -> UUIDs of the run's GPUs there; `host`: the node whose clock stamps the series. None without
    energy counters, and before two steps."""
    ends = _ends(series, energy.span_ns(host))
    if ends is None or not gpus:
        return None
    first, last = ends
    span = energy.span_ns(host)
    assert span is not None
    ages_s = ((span[1] - first.end_ns) / 1e9, (span[1] - last.end_ns) / 1e9)
    total = 0.0
    for node, uuids in gpus.items():
        joules = energy.joules(node, uuids, ages_s)
        if joules is None:
            return None
        total += joules
    per_step = total / (last.step - first.step)
    return EnergyUse(
        joules_per_step=per_step,
        joules_per_million_tokens=per_step / tokens_per_step * 1e6 if tokens_per_step else None,
        power_w=total / (ages_s[0] - ages_s[1]),
    )


def _ends(series: Series, span: tuple[int, int] | None) -> tuple[StepResult, StepResult] | None:
    if span is None:
        return None
    inside = [point for point in series if span[0] <= point.end_ns <= span[1]]
    if len(inside) < 2:
        return None
    last = inside[-1]
    first = next(
        (point for point in inside[:-1] if last.end_ns - point.end_ns <= WINDOW_S * 1e9),
        inside[-2],
    )
    return (first, last) if first.step < last.step and first.end_ns < last.end_ns else None


def _total_at(samples: list[NodeStats], uuids: frozenset[str], at_ns: float) -> float | None:
    """The sum of the counters at a moment, between two samples by interpolation."""
    place = bisect_left(samples, at_ns, key=lambda stats: stats.at_ns)
    if place == len(samples) or (place == 0 and samples[0].at_ns > at_ns):
        return None
    after = _sum(samples[place], uuids)
    if samples[place].at_ns == at_ns or after is None:
        return after
    before = _sum(samples[place - 1], uuids)
    if before is None:
        return None
    share = (at_ns - samples[place - 1].at_ns) / (samples[place].at_ns - samples[place - 1].at_ns)
    return before + share * (after - before)


def _sum(stats: NodeStats, uuids: frozenset[str]) -> float | None:
    counters = _counters(stats)
    return sum(counters[uuid] for uuid in uuids) if uuids <= counters.keys() else None


def _counters(stats: NodeStats) -> dict[str, float]:
    return {gpu.uuid.removeprefix("GPU-"): gpu.energy_j for gpu in stats.gpus or () if gpu.energy_j is not None}


def _continues(before: NodeStats, stats: NodeStats) -> bool:
    if stats.at_ns < before.at_ns:  # the node was restarted
        return False
    now = _counters(stats)
    return all(now.get(uuid, joules) >= joules for uuid, joules in _counters(before).items())
