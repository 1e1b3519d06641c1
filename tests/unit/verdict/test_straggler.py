"""Which rank costs the others time: verdicts weigh time, come soon, and stay."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from runtime.wire.messages import Collectives, StepResult
from tests.unit.state.test_stall import WORLD, a_run, hello
from zerotop.state.run import RunState
from zerotop.state.waits import HISTORY_STEPS, WINDOW_STEPS
from zerotop.verdict.figures import History
from zerotop.verdict.finding import Finding
from zerotop.verdict.straggler import find_straggler


def straggler(run: RunState, named: int | None = None) -> Finding | None:
    """The finding if the verdict so far names `named`."""
    before = Finding("straggler", "", ranks=(named,)) if named is not None else None
    return find_straggler(History().figures(run, before, 0.0))


def slow_rank(run: RunState, named: int | None = None) -> int | None:
    found = straggler(run, named)
    return found.ranks[0] if found is not None else None


# ---- from durations ------------------------------------------------------------------------------------------------
def meet(run: RunState, durations_us: dict[int, int], steps: int, per_step: int = 4) -> None:
    seq = 0
    for step in range(1, steps + 1):
        for rank, duration in durations_us.items():
            records = [(seq + k, "reduce", 1 << 20, 0, 0, duration, duration) for k in range(1, per_step + 1)]
            run.apply(Collectives(rank=rank, step=step, records=records))
        seq += per_step


def test_the_rank_with_the_shortest_collectives_came_last() -> None:
    run = a_run(step_ms=400)
    meet(run, {0: 21_000, 1: 1_000, 2: 21_500}, steps=10)
    found = straggler(run)
    assert found is not None and found.ranks == (1,) and found.what == "straggler"
    assert found.text == "the others wait for rank 1, 81.0 ms a step (20%); it came last in 32 of 32 collectives"
    assert (found.facts["others_wait_ms"], found.facts["came_last"]) == (81.0, 32)
    window = run.waits.window()
    assert window.steps == 9 and window.step_ms == 400  # the newest is still being reported
    assert set(window.came_last) == {1}
    assert window.waited_ms == pytest.approx({0: 80.0, 1: 0.0, 2: 82.0})


def test_a_last_place_that_goes_round_or_costs_little_is_no_verdict() -> None:
    even = a_run()
    seq = 0
    for step in range(1, 11):
        for rank in range(WORLD):
            records = [
                (seq + k, "reduce", 1, 0, 0, (us := 1_000 if k % WORLD == rank else 40_000), us) for k in range(1, 7)
            ]
            even.apply(Collectives(rank=rank, step=step, records=records))
        seq += 6
    assert slow_rank(even) is None
    cheap = a_run(step_ms=400)
    meet(cheap, {0: 1_500, 1: 1_000, 2: 1_500}, steps=10)
    assert slow_rank(cheap) is None
    assert slow_rank(a_run()) is None


def meet_in_turns(run: RunState, last: str, cost_us: dict[int, int], first_step: int = 1) -> None:
    """One step per character of `last`: who came last in its one collective; the others waited what that rank costs."""
    world = run.world_size
    for step, who in enumerate(last, first_step):
        for rank in range(world):
            duration = 1_000 if rank == int(who) else 1_000 + cost_us[int(who)]
            run.apply(Collectives(rank=rank, step=step, records=[(step, "reduce", 1, 0, 0, duration, duration)]))


@pytest.mark.parametrize(
    ("world", "last_of_ten", "named"),
    [(2, 6, False), (2, 8, False), (2, 9, False), (2, 10, True), (3, 8, False), (3, 9, True), (8, 8, True)],
)
def test_a_rank_is_named_only_well_above_its_fair_share(world: int, last_of_ten: int, named: bool) -> None:
    run = a_run(steps=21, world=world)
    meet_in_turns(run, ("1" * last_of_ten + "0" * (10 - last_of_ten)) * 2 + "0", {0: 40_000, 1: 40_000})
    assert slow_rank(run) == (1 if named else None)


def test_a_rank_that_waits_most_is_not_named_for_coming_last_by_a_hair() -> None:
    run = a_run(steps=21, step_ms=100)
    meet_in_turns(run, ("1" * 8 + "0" * 2) * 2 + "0", {1: 8_000, 0: 80_000})
    assert run.waits.window().came_last == {1: 16, 0: 4}
    assert run.waits.window().caused_ms[1] > 0.05 * 100
    assert slow_rank(run) is None


@pytest.mark.parametrize(
    ("last", "anew", "kept"),
    [("1111111110", 1, 1), ("1101110110", None, 1), ("1111102020", None, None)],
    ids=["9 of 10", "7 of 10", "5 of 10"],
)
def test_a_verdict_in_doubt_stays_as_it_was(last: str, anew: int | None, kept: int | None) -> None:
    run = a_run(steps=21)
    meet_in_turns(run, last * 2 + "0", {0: 40_000, 1: 40_000, 2: 40_000})
    assert (slow_rank(run), slow_rank(run, named=0), slow_rank(run, named=1)) == (anew, anew, kept)


def test_only_the_newest_steps_count_and_a_new_attempt_starts_anew() -> None:
    run = a_run(steps=121)
    meet_in_turns(run, "1" * 100, {1: 40_000})
    assert slow_rank(run) is not None
    meet_in_turns(run, "0" * (WINDOW_STEPS + 1), {0: 40_000}, first_step=101)
    window = run.waits.window()
    assert window.steps == WINDOW_STEPS and window.came_last == {0: WINDOW_STEPS}
    for step in range(122, 122 + HISTORY_STEPS):
        run.waits.step_took(step, 100.0)
    assert len(run.waits._steps) == HISTORY_STEPS
    run.apply(hello(0).model_copy(update={"attempt": 2}))
    assert run.waits.window().steps == 0 and slow_rank(run, named=0) is None


# ---- from synthetic steps ------------------------------------------------------------------------------------------
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
                duration_us = int(1000 * (1 + last - arrival[rank]))
                records[rank].append((seq, kind, 1 << 20, 0, 0, duration_us, duration_us))
        for rank in range(world):
            run.apply(Collectives(rank=rank, step=step, records=records[rank]))
            run.apply(StepResult(rank=rank, step=step, loss=1.0, lr=1e-3, grad_norm=1.0, step_ms=step_ms, end_ns=0))
        named = slow_rank(run, named)
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
