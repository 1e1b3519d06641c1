"""Verdicts from sequences of messages: when a run stands still, who is to blame, and when to say nothing."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Collectives, Goodbye, Heartbeat, Hello, RunStatus, StepResult
from zerotop.state.run import RunState
from zerotop.state.stall import find_laggard, find_stall, threshold_s
from zerotop.state.waits import STEPS_KEPT, WINDOW_STEPS

S = 1_000_000_000
WORLD = 3


def a_run(steps: int = 10, step_ms: float = 400.0, state: str = "running", world: int = WORLD) -> RunState:
    run = RunState()
    run.hub_now_ns = 1000 * S
    run.apply(RunStatus(name="q1", state=state))  # type: ignore[arg-type]
    for rank in range(world):
        run.apply(hello(rank, world), run.hub_now_ns)
        for step in range(1, steps + 1):
            run.apply(
                StepResult(rank=rank, step=step, loss=2.0, lr=1e-3, grad_norm=1.0, step_ms=step_ms, end_ns=0),
                run.hub_now_ns,
            )
    return run


def hello(rank: int, world: int = WORLD, start_step: int = 0) -> Hello:
    return Hello(
        run="q1",
        attempt=1,
        rank=rank,
        local_rank=rank,
        world_size=world,
        host="a",
        pid=1,
        boot_id="b",
        wall_s=0,
        mono_ns=0,
        device="cpu",
        config_digest="d",
        stage=2,
        precision="fp32",
        micro_batch=1,
        accumulation=4,
        global_batch=4,
        start_step=start_step,
    )


def beat(
    run: RunState, rank: int, entered: int, completed: int, idle_s: float, phase: str = "backward", op: str = "reduce"
) -> None:
    """The rank's own clock runs an hour ahead of the hub's: verdicts must not mind."""
    now_ns = run.hub_now_ns + 3600 * S
    idle_ns = int(idle_s * S)
    run.apply(
        Heartbeat(
            rank=rank,
            phase=phase,
            phase_since_ns=now_ns - idle_ns,
            step=11,
            micro_step=3,
            micro_steps=4,
            entered_seq=entered,
            completed_seq=completed,
            entered_op=op,
            progress_ns=now_ns - idle_ns,
            now_ns=now_ns,
        ),
        run.hub_now_ns,
    )


def stuck(run: RunState, idle_s: float = 14.0) -> None:
    beat(run, 0, 1532, 1531, idle_s)
    beat(run, 1, 1531, 1531, idle_s, op="gather")
    beat(run, 2, 1532, 1531, idle_s)


def test_the_rank_that_is_missing_in_a_collective_is_named() -> None:
    run = a_run()
    stuck(run)
    stall = find_stall(run)
    assert stall is not None
    assert (stall.missing, stall.waiting, stall.seq, stall.op) == ((1,), (0, 2), 1532, "reduce")
    assert stall.text.startswith(
        "no progress for 14 s: rank 1 has not entered collective 1532 (reduce), ranks 0, 2 wait in it"
    )
    assert "rank 1 is in backward 3/4" in stall.text


def test_ranks_that_ran_ahead_do_not_hide_the_missing_one() -> None:
    run = a_run()
    beat(run, 0, 1535, 1531, 14, op="gather")
    beat(run, 1, 1531, 1531, 14)
    beat(run, 2, 1532, 1531, 14, op="reduce")
    stall = find_stall(run)
    assert stall is not None and (stall.missing, stall.waiting, stall.seq, stall.op) == ((1,), (0, 2), 1532, "reduce")


def test_a_collective_that_all_have_entered_is_named() -> None:
    run = a_run()
    for rank in range(WORLD):
        beat(run, rank, 1532, 1531, 20)
    stall = find_stall(run)
    assert stall is not None and stall.missing == () and stall.waiting == (0, 1, 2)
    assert "all ranks have entered collective 1532 (reduce), it does not complete" in stall.text


def test_one_rank_that_does_not_leave_is_named() -> None:
    run = a_run()
    beat(run, 0, 1532, 1532, 20)
    beat(run, 1, 1532, 1531, 20)
    beat(run, 2, 1532, 1532, 20)
    stall = find_stall(run)
    assert stall is not None and "rank 1 has not left it" in stall.text


def test_a_stall_outside_collectives_says_where_the_ranks_are() -> None:
    run = a_run()
    for rank in range(WORLD):
        beat(run, rank, 1532, 1532, 20, phase="data")
    stall = find_stall(run)
    assert stall is not None and "all ranks are in data 3/4, outside any collective" in stall.text


def test_a_rank_that_fell_silent_counts_as_idle_and_is_named() -> None:
    run = a_run()
    stuck(run, idle_s=0.0)
    run.hub_now_ns += 13 * S
    beat(run, 0, 1532, 1531, 13)
    beat(run, 2, 1532, 1531, 13)
    stall = find_stall(run)
    assert stall is not None and stall.silent == (1,) and stall.missing == (1,)
    assert "nothing heard from rank 1" in stall.text


def test_a_silent_rank_s_last_word_may_be_older_than_what_the_others_have_completed() -> None:
    run = a_run()
    beat(run, 0, 1532, 1531, 14)
    beat(run, 1, 1520, 1519, 14)
    beat(run, 2, 1532, 1531, 14)
    stall = find_stall(run)
    assert stall is not None and (stall.missing, stall.waiting, stall.seq, stall.op) == ((1,), (0, 2), 1532, "reduce")


def test_one_rank_that_moves_is_not_a_stall() -> None:
    run = a_run()
    stuck(run)
    beat(run, 1, 1531, 1531, 0.2, phase="data")
    assert find_stall(run) is None


@pytest.mark.parametrize(("idle_s", "stalled"), [(9.5, False), (10.5, True)])
def test_ten_seconds_are_the_least(idle_s: float, stalled: bool) -> None:
    run = a_run(step_ms=400)
    stuck(run, idle_s)
    assert (find_stall(run) is not None) is stalled


@pytest.mark.parametrize(("idle_s", "stalled"), [(39, False), (41, True)])
def test_slow_steps_stretch_the_threshold(idle_s: float, stalled: bool) -> None:
    run = a_run(step_ms=8000)
    assert threshold_s(run) == pytest.approx(40)
    stuck(run, idle_s)
    assert (find_stall(run) is not None) is stalled


@pytest.mark.parametrize("state", ["starting", "paused", "restarting", "stopped", "finished", "aborted", "failed"])
def test_no_verdict_in_states_that_stand_still_rightly(state: str) -> None:
    run = a_run(state=state)
    stuck(run)
    assert find_stall(run) is None


@pytest.mark.parametrize("phase", ["checkpoint", "paused", "eval", "init"])
def test_no_verdict_while_a_rank_is_in_a_quiet_phase(phase: str) -> None:
    run = a_run()
    stuck(run)
    beat(run, 1, 1531, 1531, 14, phase=phase)
    assert find_stall(run) is None


def test_no_verdict_in_the_first_steps_of_an_attempt() -> None:
    run = a_run(steps=2)
    stuck(run)
    assert find_stall(run) is None
    resumed = a_run(steps=52)
    for rank in range(WORLD):
        resumed.apply(hello(rank, start_step=50))
    stuck(resumed)
    assert find_stall(resumed) is None


def test_ranks_that_said_goodbye_are_not_missing() -> None:
    run = a_run()
    stuck(run)
    run.apply(Goodbye(rank=1, outcome="finished", step=10, wall_s=0))
    stall = find_stall(run)
    assert stall is not None and stall.missing == ()


def test_many_ranks_are_named_in_ranges() -> None:
    run = a_run(world=64)
    for rank in range(64):
        beat(run, rank, 7 if rank == 9 else 8, 7, 14)
    stall = find_stall(run)
    assert stall is not None and "ranks 0-8, 10-63 wait in it" in stall.text


def meet(run: RunState, durations_us: dict[int, int], steps: int, per_step: int = 4) -> None:
    seq = 0
    for step in range(1, steps + 1):
        for rank, duration in durations_us.items():
            records = [(seq + k, "reduce", 1 << 20, 0, 0, duration, 0) for k in range(1, per_step + 1)]
            run.apply(Collectives(rank=rank, step=step, records=records))
        seq += per_step


def test_the_rank_with_the_shortest_collectives_came_last() -> None:
    run = a_run(step_ms=400)
    meet(run, {0: 21_000, 1: 1_000, 2: 21_500}, steps=10)
    laggard = find_laggard(run)
    assert laggard is not None and laggard.rank == 1 and laggard.share == 1.0
    assert laggard.others_wait_ms == pytest.approx(4 * 20.25)
    assert laggard.text == "rank 1 came last in 100% of collectives; others wait 81.0 ms a step (20%)"
    window = run.waits.window()
    assert window.steps == 9 and window.step_ms == 400  # the newest is still being reported
    assert window.came_last_share == {1: 1.0}
    assert window.waited_ms == pytest.approx({0: 80.0, 1: 0.0, 2: 82.0})


def test_a_last_place_that_goes_round_or_costs_little_is_no_verdict() -> None:
    even = a_run()
    seq = 0
    for step in range(1, 11):
        for rank in range(WORLD):
            records = [(seq + k, "reduce", 1, 0, 0, 1_000 if k % WORLD == rank else 40_000, 0) for k in range(1, 7)]
            even.apply(Collectives(rank=rank, step=step, records=records))
        seq += 6
    assert find_laggard(even) is None
    cheap = a_run(step_ms=400)
    meet(cheap, {0: 1_500, 1: 1_000, 2: 1_500}, steps=10)
    assert find_laggard(cheap) is None
    assert find_laggard(a_run()) is None


def meet_in_turns(run: RunState, last: str, cost_us: dict[int, int], first_step: int = 1) -> None:
    """One step per character of `last`: who came last in its one collective; the others waited what that rank costs."""
    world = run.world_size
    for step, who in enumerate(last, first_step):
        for rank in range(world):
            duration = 1_000 if rank == int(who) else 1_000 + cost_us[int(who)]
            run.apply(Collectives(rank=rank, step=step, records=[(step, "reduce", 1, 0, 0, duration, 0)]))


@pytest.mark.parametrize(
    ("world", "last_of_ten", "named"),
    [(2, 6, False), (2, 8, False), (2, 9, False), (2, 10, True), (3, 7, False), (3, 8, True), (8, 8, True)],
)
def test_a_rank_is_named_only_well_above_its_fair_share(world: int, last_of_ten: int, named: bool) -> None:
    run = a_run(steps=21, world=world)
    meet_in_turns(run, ("1" * last_of_ten + "0" * (10 - last_of_ten)) * 2 + "0", {0: 40_000, 1: 40_000})
    laggard = find_laggard(run)
    assert (laggard is not None) is named
    assert laggard is None or laggard.rank == 1


def test_a_rank_that_waits_most_is_not_named_for_coming_last_by_a_hair() -> None:
    run = a_run(steps=21, step_ms=100)
    meet_in_turns(run, ("1" * 8 + "0" * 2) * 2 + "0", {1: 8_000, 0: 80_000})
    assert run.waits.window().came_last_share[1] == pytest.approx(0.8)
    assert run.waits.window().caused_ms[1] > 0.05 * 100
    assert find_laggard(run) is None


def test_a_verdict_in_doubt_stays_as_it_was() -> None:
    run = a_run(steps=21)
    meet_in_turns(run, ("1" * 6 + "02" + "11") * 2 + "0", {0: 40_000, 1: 40_000, 2: 40_000})
    assert find_laggard(run) is not None  # 16 of 20
    run = a_run(steps=21)
    meet_in_turns(run, ("1" * 6 + "0202") * 2 + "0", {0: 40_000, 1: 40_000, 2: 40_000})
    assert find_laggard(run) is None and find_laggard(run, named=0) is None  # 12 of 20
    kept = find_laggard(run, named=1)
    assert kept is not None and kept.rank == 1
    run = a_run(steps=21)
    meet_in_turns(run, ("1" * 5 + "02020") * 2 + "0", {0: 40_000, 1: 40_000, 2: 40_000})
    assert find_laggard(run, named=1) is None  # 10 of 20


def test_only_the_newest_steps_count_and_a_new_attempt_starts_anew() -> None:
    run = a_run(steps=121)
    meet_in_turns(run, "1" * 100, {1: 40_000})
    assert find_laggard(run) is not None
    meet_in_turns(run, "0" * (WINDOW_STEPS + 1), {0: 40_000}, first_step=101)
    window = run.waits.window()
    assert window.steps == WINDOW_STEPS and window.came_last == {0: WINDOW_STEPS}
    assert len(run.waits._steps) <= STEPS_KEPT
    run.apply(hello(0).model_copy(update={"attempt": 2}))
    assert run.waits.window().steps == 0 and find_laggard(run, named=0) is None
