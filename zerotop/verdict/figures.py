"""What the rules look at: everything is computed once per look."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runtime.wire.node import GpuStats, NodeStats
from zerotop.state.breakdown import Breakdown, Part
from zerotop.state.memory import gpu_of
from zerotop.state.run import RankState, RunState
from zerotop.state.stall import FIRST_STEPS, is_past, is_quiet
from zerotop.state.waits import WaitWindow
from zerotop.verdict.finding import Finding

SAMPLES_KEPT, SAMPLES_LONG = 5, 30
"""Samples of the probe, one a second, that a figure of the host is the mean of, now and in the longer run."""
MEMORY_WINDOW_S = 30.0
PAGING_S = 5.0
"""Page faults are counted over this time at least."""
FAULTS_PER_S = 100.0
"""Page faults per second that had to read from disk or swap: a process that has its pages has none."""


@dataclass(frozen=True)
class MemorySample:
    """One rank's counters of memory trouble at one time."""

    at_s: float
    alloc_retries: int
    major_faults: int


@dataclass(frozen=True)
class Figures:
    """`before` is the verdict so far: a rule may keep to it well below the limits at which it would say it anew."""

    state: RunState
    before: Finding | None
    window: WaitWindow
    breakdowns: Mapping[int, Breakdown]
    run_delay_percent: Mapping[int, float]
    """Rank -> share of the last seconds in which its main thread waited for a CPU."""
    long_delay_percent: float
    """The same of all ranks over half a minute: other processes come and go."""
    memory: Mapping[int, tuple[MemorySample, ...]]
    """Rank -> its counters of the last MEMORY_WINDOW_S, oldest first."""

    def page_faults_per_s(self, rank: int, over_all: bool = False) -> float:
        """Pages per second that the rank had to read from disk or swap, over the newest PAGING_S; 0 with fewer samples.
        over_all: over all samples, if they show more."""
        samples = self.memory.get(rank, ())
        before = [was for was in samples if samples[-1].at_s - was.at_s >= PAGING_S]
        since = [before[-1], *(before[:1] if over_all else ())] if before else []
        now = samples[-1] if samples else None
        return max(
            ((now.major_faults - was.major_faults) / (now.at_s - was.at_s) for was in since if now is not None),
            default=0.0,
        )

    def over(self, steps: int) -> Figures:
        """The same with the means of the newest `steps` steps."""
        window = self.state.waits.window(steps)
        return replace(self, window=window, breakdowns=self.state.breakdowns.recent(window.waited_ms, steps))

    @property
    def steps_taken(self) -> int:
        """Steps of this attempt."""
        hello = self.state.hello
        return self.state.step - (hello.start_step if hello else 0)

    @property
    def warming_up(self) -> bool:
        """The first steps compile, allocate and fill caches: their times say nothing."""
        return not is_past(self.state, FIRST_STEPS)

    @property
    def present(self) -> list[RankState]:
        """Ranks that have reported and have not left."""
        return [r for _, r in sorted(self.state.ranks.items()) if r.heartbeat is not None and r.goodbye is None]

    @property
    def expected(self) -> list[RankState]:
        """Ranks that have introduced themselves and have not left, whether or not anything was heard since."""
        return [r for _, r in sorted(self.state.ranks.items()) if r.hello is not None and r.goodbye is None]

    @property
    def quiet(self) -> bool:
        """Whether a rank does something for which the others may rightly stand still."""
        return any(is_quiet(rank) for rank in self.present)

    @property
    def step_ms(self) -> float:
        """The mean of the recent steps; 0 before the first."""
        if self.window.step_ms:
            return self.window.step_ms
        return statistics.fmean(b.step_ms for b in self.breakdowns.values()) if self.breakdowns else 0.0

    def node_of(self, rank: int) -> NodeStats | None:
        """The rank's node, as its probe reported it last."""
        known = self.state.ranks.get(rank)
        return self.state.nodes.get(known.hello.host) if known is not None and known.hello is not None else None

    def gpu_of(self, rank: int) -> GpuStats | None:
        """The rank's GPU; None on a CPU."""
        known = self.state.ranks.get(rank)
        return gpu_of(self.state, known) if known is not None else None

    def others_ms(self, rank: int, part: Part) -> float | None:
        """The median of `part` over the other ranks; None without any."""
        others = [getattr(b, part) for number, b in self.breakdowns.items() if number != rank]
        return statistics.median(others) if others else None

    def least_share(self, part: Part) -> float:
        """The smallest lasting share of the step that the part takes on any rank: what all of them have in common."""
        return min((self.state.breakdowns.lasting_share(rank, part) for rank in self.breakdowns), default=0.0)


@dataclass
class History:
    """What the figures need from earlier looks."""

    delays: dict[int, deque[float]] = field(default_factory=dict)
    memory: dict[int, deque[MemorySample]] = field(default_factory=dict)
    _seen_ns: dict[str, int] = field(default_factory=dict)

    def figures(self, state: RunState, before: Finding | None, now_s: float) -> Figures:
        """Take a look at the state at `now_s` (a monotonic clock)."""
        for host, node in state.nodes.items():
            if self._seen_ns.get(host) == node.at_ns:
                continue
            self._seen_ns[host] = node.at_ns
            for rank, percent in node.rank_run_delay_percent.items():
                self.delays.setdefault(rank, deque(maxlen=SAMPLES_LONG)).append(percent)
        for rank, known in state.ranks.items():
            if known.memory is not None:
                kept = self.memory.setdefault(rank, deque())
                sample = MemorySample(now_s, known.memory.alloc_retries or 0, known.memory.major_faults or 0)
                if kept and (sample.alloc_retries, sample.major_faults) < (
                    kept[-1].alloc_retries,
                    kept[-1].major_faults,
                ):
                    kept.clear()  # a new process
                kept.append(sample)
                while kept[0].at_s < now_s - MEMORY_WINDOW_S:
                    kept.popleft()
        window = state.waits.window()
        return Figures(
            state=state,
            before=before,
            window=window,
            breakdowns=state.breakdowns.recent(window.waited_ms),
            run_delay_percent={
                rank: statistics.fmean(list(kept)[-SAMPLES_KEPT:])
                for rank, kept in self.delays.items()
                if len(kept) >= SAMPLES_KEPT
            },
            long_delay_percent=statistics.fmean(statistics.fmean(kept) for kept in self.delays.values() if kept)
            if self.delays
            else 0.0,
            memory={rank: tuple(kept) for rank, kept in self.memory.items() if kept},
        )
