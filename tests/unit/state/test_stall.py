"""Verdicts from sequences of messages: when a run stands still, who is to blame, and when to say nothing."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Goodbye, Heartbeat, Hello, RunStatus, StepResult
from zerotop.state.condition import condition_of
from zerotop.state.run import RunState
from zerotop.state.stall import find_stall, threshold_s

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
    run: RunState,
    rank: int,
    entered: int,
    completed: int,
    idle_s: float,
    phase: str = "backward",
    op: str = "reduce",
    compiling: bool = False,
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
            compiling=compiling,
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


def test_no_verdict_while_a_rank_compiles_long_after_its_first_steps() -> None:
    run = a_run(steps=500)
    stuck(run)
    assert condition_of(run).name == "stalled"
    beat(run, 1, 1531, 1531, 14, compiling=True)
    assert find_stall(run) is None and condition_of(run).name == "running"


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


def test_ranks_that_count_no_steps_stall_in_collectives_only() -> None:
    run = a_run(steps=0)
    for rank in range(WORLD):
        run.apply(hello(rank).model_copy(update={"counts_steps": False}), run.hub_now_ns)
        beat(run, rank, entered=100, completed=100, idle_s=60, phase="idle", op="")
    assert find_stall(run) is None  # it may be saving, or at its end
    beat(run, 0, entered=101, completed=100, idle_s=29, phase="idle", op="all_reduce")
    assert find_stall(run) is None
    beat(run, 0, entered=101, completed=100, idle_s=31, phase="idle", op="all_reduce")
    stall = find_stall(run)
    assert stall is not None and stall.missing == (1, 2)
    assert stall.cause.endswith("rank 1 is in its script")
