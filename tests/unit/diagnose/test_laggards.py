"""Which rank costs the others time, from synthetic steps: verdicts weigh time, come soon, and stay."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from runtime.wire.messages import Collectives, StepResult
from tests.unit.diagnose.test_hang import PlayedHub
from tests.unit.state.test_stall import a_run
from zerotop.diagnose.laggards import LaggardWatch
from zerotop.report import status_document, status_text
from zerotop.state.stall import Laggard, find_laggard

MICRO_STEPS = 2
LateMs = Callable[[random.Random, int, int], float]
"""(noise, step, rank) -> how much later than its fastest the rank reaches a micro-step's collective."""


def jitter(noise: random.Random, step: int, rank: int) -> float:
    """A healthy CPU rank: a few per cent of a step, with a tail."""
    return noise.expovariate(1 / 4.0)


def sleeping(rank: int, late_ms: float) -> LateMs:
    return lambda noise, step, who: jitter(noise, step, who) + (late_ms if who == rank else 0.0)


def slow_loader(rank: int) -> LateMs:
    """Batches that take 30 to 90 ms, before the first micro-step or so."""
    return lambda noise, step, who: jitter(noise, step, who) + (noise.uniform(30, 90) if who == rank else 0.0)


def hiccup(noise: random.Random, step: int, rank: int) -> float:
    """Healthy, but for one pause of two seconds."""
    return jitter(noise, step, rank) + (2000.0 if (step, rank) == (60, 1) else 0.0)


def verdicts(late: LateMs, world: int = 2, steps: int = 200, seed: int = 0, gathers: int = 6) -> list[int | None]:
    """Who was named after each step. Beside the reduce of each micro-step, every step has `gathers` small collectives
    whose skew of 0.4 to 2.5 ms falls on any rank: they are most of its collectives."""
    noise, run, named, told, seq = random.Random(seed), a_run(steps=0, world=world), None, [], 0
    for step in range(1, steps + 1):
        step_ms, records = 100.0, {rank: [] for rank in range(world)}
        for kind in ["reduce"] * MICRO_STEPS + ["gather"] * gathers:
            if kind == "reduce":
                arrival = [late(noise, step, rank) for rank in range(world)]
            else:
                arrival = [noise.uniform(0.4, 2.5) for _ in range(world)]
            seq, last = seq + 1, max(arrival)
            step_ms += last
            for rank in range(world):
                records[rank].append((seq, kind, 1 << 20, 0, 0, int(1000 * (1 + last - arrival[rank])), 0))
        for rank in range(world):
            run.apply(Collectives(rank=rank, step=step, records=records[rank]))
            run.apply(StepResult(rank=rank, step=step, loss=1.0, lr=1e-3, grad_norm=1.0, step_ms=step_ms, end_ns=0))
        found = find_laggard(run, named)
        named = found.rank if found is not None else None
        told.append(named)
    return told


def changes(told: list[int | None]) -> int:
    return sum(before != after for before, after in pairwise(told))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize(
    "late", [sleeping(1, 50), sleeping(1, 200), slow_loader(1)], ids=["50 ms", "200 ms", "slow loader"]
)
def test_a_slow_rank_is_named_soon_and_stays_so(late: LateMs, world: int, seed: int) -> None:
    told = verdicts(late, world, steps=80, seed=seed)
    assert told[15:] == [1] * 65 and changes(told) == 1


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("late", [jitter, hiccup], ids=["noise", "one pause"])
def test_nobody_is_named_among_healthy_ranks(late: LateMs, world: int) -> None:
    for seed in range(2):
        assert set(verdicts(late, world, steps=150, seed=seed)) == {None}


def test_a_slow_rank_is_named_by_time_though_it_seldom_comes_last() -> None:
    assert verdicts(sleeping(1, 50), steps=40, gathers=60)[-1] == 1


def test_the_verdict_follows_a_rank_that_becomes_slow_and_recovers() -> None:
    def late(noise: random.Random, step: int, rank: int) -> float:
        return jitter(noise, step, rank) + (60.0 if rank == 0 and 100 < step <= 200 else 0.0)

    told = verdicts(late, steps=260)
    assert set(told[:100]) == {None} and changes(told) == 2
    assert told[130:200] == [0] * 70 and told[215:] == [None] * 45


def test_the_run_tells_a_slow_rank_once_and_when_it_is_no_longer_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Laggard | None] = [None]
    monkeypatch.setattr("zerotop.diagnose.laggards.find_laggard", lambda state, before: found[0])
    hub = PlayedHub(a_run())
    watch = LaggardWatch(hub)  # type: ignore[arg-type]

    def told(verdict: Laggard | None) -> list[str]:
        found[0], known = verdict, len(hub.events)
        for _ in range(3):
            watch.look()
        return [event.text for event in hub.events[known:]]

    assert told(None) == [] and hub.status.laggard_rank is None
    assert told(Laggard(1, 0.6, 100.0, "rank 1: 100 ms")) == ["rank 1: 100 ms"]
    assert told(Laggard(1, 0.6, 110.0, "rank 1: 110 ms")) == []
    assert (hub.status.laggard_rank, hub.status.laggard) == (1, "rank 1: 100 ms")
    assert told(Laggard(1, 0.6, 200.0, "rank 1: 200 ms")) == [] and hub.status.laggard == "rank 1: 200 ms"
    document = status_document(hub.state)
    assert (document["laggard_rank"], document["laggard"]) == (1, "rank 1: 200 ms")
    assert "rank 1: 200 ms" in status_text(document)
    assert told(None) == ["rank 1 no longer holds the others up"] and hub.status.laggard == ""
    told(Laggard(0, 0.6, 200.0, "rank 0: 200 ms"))
    hub.set_status(state="restarting")
    assert told(None) == [] and hub.status.laggard_rank is None
