"""Each verdict from the messages that are evidence for it, and its silence without them."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.wire.messages import Collectives, Event, Goodbye, RunStatus, StepResult
from runtime.wire.node import BusyProcess, GpuStats, NodeStats
from tests.unit.state.test_stall import WORLD, S, a_run, beat, hello, stuck
from zerotop.state.run import RunState
from zerotop.state.waits import HISTORY_STEPS, Waits
from zerotop.verdict.figures import SAMPLES_KEPT, SAMPLES_LONG, History
from zerotop.verdict.finding import Finding
from zerotop.verdict.judge import Rule
from zerotop.verdict.slow import find_contention, find_data_starvation, find_slow_link
from zerotop.verdict.stopped import find_dead, find_failed, find_wedged
from zerotop.verdict.straggler import find_straggler
from zerotop.verdict.stuck import find_desync, find_hang

MIB = 2**20


def ask(rule: Rule, run: RunState, before: Finding | None = None) -> Finding | None:
    return rule(History().figures(run, before, 0.0))


def node(run: RunState, **changes: Any) -> None:
    values: dict[str, Any] = {
        "host": "a",
        "cpu_percent": 50.0,
        "cpu_count": 8,
        "load_1m": 1.5,
        "ram_used_bytes": 1,
        "ram_total_bytes": 2,
        "at_ns": run.hub_now_ns,
        "wall_s": 1.0,
    }
    run.apply(NodeStats(**{**values, **changes}), run.hub_now_ns)


def heard(run: RunState, silent: int, seconds: float) -> None:
    """Time goes by in which every rank but `silent` is heard."""
    for rank in range(WORLD):
        beat(run, rank, 5, 5, 0.0)
    run.hub_now_ns += int(seconds * S)
    for rank in range(WORLD):
        if rank != silent:
            beat(run, rank, 5, 5, 0.0)


def trained(run: RunState, phase_ms: dict[int, dict[str, float]], steps: int = 10, first: int = 11) -> None:
    """Steps in which each rank spends these times; a reduce takes 10 ms, the rest of it is waiting."""
    for step in range(first, first + steps):
        for rank, phases in phase_ms.items():
            run.apply(
                StepResult(
                    rank=rank,
                    step=step,
                    loss=1.0,
                    lr=1e-3,
                    grad_norm=1.0,
                    step_ms=sum(phases.values()),
                    phase_ms=phases,
                    phase_wait_ms={"reduce": phases["reduce"] - 10.0} if "reduce" in phases else {},
                    end_ns=0,
                )
            )


def met(run: RunState, last: int, wait_us: int, steps: int = 10, first: int = 11, seq: int = 0) -> None:
    """One collective per step, for which the others wait for rank `last`."""
    for step in range(first, first + steps):
        for rank in range(WORLD):
            duration = 1000 if rank == last else 1000 + wait_us
            run.apply(Collectives(rank=rank, step=step, records=[(seq + step, "reduce", MIB, 0, 0, duration, wait_us)]))


# ---- dead and wedged ---------------------------------------------------------------------------------------------
def test_a_process_that_is_gone_is_dead() -> None:
    run = a_run()
    heard(run, silent=1, seconds=2.0)
    node(run, rank_process={0: "running", 1: "gone", 2: "running"})
    found = ask(find_dead, run)
    assert found is not None and (found.what, found.ranks, found.severity) == ("dead", (1,), "error")
    assert found.text == "the process of rank 1 (pid 1) is gone"
    run.apply(Goodbye(rank=1, outcome="finished", step=10, wall_s=0.0))
    assert ask(find_dead, run) is None


@pytest.mark.parametrize(
    ("process", "cpu", "seconds", "says"),
    [
        ("stopped", 0.0, 2.0, "stopped by a signal or a debugger"),
        ("disk-sleep", 0.0, 6.0, "hangs in the kernel"),
        ("running", 99.0, 6.0, "uses 99% of a CPU, so C code spins and holds the GIL"),
        ("sleeping", 0.0, 6.0, "blocks while it holds the GIL"),
        ("zombie", 0.0, 6.0, "its parent has not noticed"),
    ],
)
def test_a_silent_process_is_wedged_and_the_kernel_says_why(
    process: str, cpu: float, seconds: float, says: str
) -> None:
    run = a_run()
    heard(run, silent=2, seconds=seconds)
    node(run, rank_process={0: "running", 1: "running", 2: process}, rank_cpu_percent={2: cpu})
    found = ask(find_wedged, run)
    assert found is not None and (found.what, found.ranks) == ("wedged", (2,)) and says in found.text
    assert found.advice and "it was in backward 3/4" in found.text


def test_a_short_silence_is_none_and_one_of_all_ranks_is_the_machines() -> None:
    run = a_run()
    heard(run, silent=2, seconds=4.0)
    node(run, rank_process={2: "running"})
    assert ask(find_wedged, run) is None
    run.hub_now_ns += 7 * S
    found = ask(find_wedged, run)
    assert found is not None and found.ranks == (0, 1, 2) and "nothing heard from any rank" in found.text


def test_a_failure_is_told_in_the_supervisors_words() -> None:
    run = a_run()
    run.apply(RunStatus(name="q1", state="failed", reason="rank 2 raised ValueError", failed_rank=2))
    found = ask(find_failed, run)
    assert found is not None and found.ranks == (2,) and found.text == "the run failed: rank 2 raised ValueError"


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ({"state": "failed", "last_checkpoint_step": 40}, "Continue with: zerotop launch --resume --name q1."),
        ({"state": "failed"}, "no checkpoint to continue from: fix what `zerotop logs q1` shows"),
        ({"state": "failed", "failed_rank": 2}, "fix what `zerotop logs q1 --rank 2` shows"),
        ({"state": "restarting", "failed_rank": 2, "attempt": 2}, "`zerotop logs q1 --rank 2 --attempt 1` has"),
    ],
)
def test_a_failure_has_a_next_step_with_and_without_a_checkpoint(status: dict[str, Any], advice: str) -> None:
    run = a_run()
    run.apply(RunStatus.model_validate({"name": "q1", "reason": "x", "restart_reason": "x", **status}))
    found = ask(find_failed, run)
    assert found is not None and advice in found.advice


# ---- stuck -------------------------------------------------------------------------------------------------------
def test_a_hang_names_the_rank_that_is_missing() -> None:
    run = a_run()
    stuck(run)
    found = ask(find_hang, run)
    assert found is not None and (found.what, found.ranks) == ("hang", (1,)) and "zerotop stacks" in found.advice
    assert found.facts["seq"] == 1532


def hang_event(run: RunState, what: str, ranks: list[int], text: str, attempt: int = 1) -> None:
    """What the hang watch says once it has the Flight Recorders."""
    flight = [{"what": what, "ranks": ranks, "text": text}]
    data = {"attempt": attempt, "flight": flight}
    run.apply(
        Event(rank=None, what="hang", text="hang", severity="error", step=run.step, data=data, wall_s=0.0),
        run.hub_now_ns,
    )


def still_outside(run: RunState) -> None:
    """The ranks stand still outside of any collective of the engine's."""
    for rank in range(WORLD):
        beat(run, rank, 1531, 1531, 20)


@pytest.mark.parametrize(
    ("what", "ranks", "verdict", "blamed"),
    [
        ("missing", [1], "hang", (1,)),
        ("different", [2], "desync", (2,)),
        ("open", [0, 1, 2], "hang in transfer", ()),
        ("open", [0, 2], "hang in transfer", (0, 2)),
    ],
)
def test_the_flight_recorders_say_what_no_heartbeat_does(
    what: str, ranks: list[int], verdict: str, blamed: tuple[int, ...]
) -> None:
    run = a_run()
    run.apply(RunStatus(name="q1", state="running", attempt=1))
    still_outside(run)
    before = ask(find_hang, run)
    assert before is not None and before.what == "no progress"
    hang_event(run, what, ranks, "rank 1 has not enqueued all_reduce 8", attempt=2)
    assert ask(find_hang, run) == before  # of another attempt
    hang_event(run, what, ranks, "rank 1 has not enqueued all_reduce 8")
    found = ask(find_hang, run)
    assert found is not None and (found.what, found.ranks) == (verdict, blamed)
    assert found.text == f"{before.text}; Flight Recorder: rank 1 has not enqueued all_reduce 8"
    assert found.facts["flight"] == "rank 1 has not enqueued all_reduce 8"


def test_the_flight_recorders_add_to_a_hang_whose_rank_is_known_until_it_is_over() -> None:
    run = a_run()
    run.apply(RunStatus(name="q1", state="running", attempt=1))
    stuck(run)
    hang_event(run, "missing", [0], "rank 0 has not enqueued broadcast 3")
    found = ask(find_hang, run)
    assert found is not None and (found.what, found.ranks) == ("hang", (1,))
    assert found.text.endswith("; Flight Recorder: rank 0 has not enqueued broadcast 3")
    run.apply(Event(rank=None, what="hang", text="progress resumed at step 11", step=run.step, wall_s=1.0))
    found = ask(find_hang, run)
    assert found is not None and "Flight" not in found.text


def test_a_collective_that_does_not_complete_blames_nobody() -> None:
    run = a_run()
    for rank in range(WORLD):
        beat(run, rank, 1532, 1531, 20)
    found = ask(find_hang, run)
    assert found is not None and (found.what, found.ranks) == ("hang in transfer", ())


def test_ranks_in_different_collectives_are_told_at_once() -> None:
    run = a_run()
    for rank in range(WORLD):
        beat(run, rank, 40, 39, 0.5, op="all_gather" if rank == 2 else "reduce_scatter")
    found = ask(find_desync, run)
    assert found is not None and (found.what, found.ranks) == ("desync", (2,))
    assert "ranks 0, 1 in reduce_scatter; rank 2 in all_gather" in found.text
    for rank in range(WORLD):
        beat(run, rank, 40, 39, 0.5)
    assert ask(find_desync, run) is None


def test_sizes_that_differ_are_told_when_a_collective_has_been_reported() -> None:
    run = a_run()
    for rank in range(WORLD):
        nbytes = MIB if rank else 2 * MIB
        run.apply(Collectives(rank=rank, step=1, records=[(1, "reduce", nbytes, 0, 0, 5, 0)]))
    found = ask(find_desync, run)
    assert found is not None and found.ranks == (0,) and "reduce of 2.00 MiB" in found.text


def test_a_rank_that_ended_while_the_others_wait() -> None:
    run = a_run()
    run.apply(Goodbye(rank=2, outcome="finished", step=10, wall_s=0.0))
    for rank in (0, 1):
        beat(run, rank, 41, 40, 4.0)
    found = ask(find_hang, run)
    assert found is not None and (found.what, found.ranks) == ("ended early", (2,)) and "drop_last" in found.advice
    for rank in (0, 1):
        beat(run, rank, 41, 40, 1.0)
    assert ask(find_hang, run) is None


# ---- slow --------------------------------------------------------------------------------------------------------
USUAL = {"data": 2.0, "forward": 100.0, "backward": 200.0, "reduce": 90.0, "step": 8.0}


@pytest.mark.parametrize(
    ("phase", "what", "says"),
    [
        ("forward", "straggler", "its forward and backward take 80.0 ms longer than theirs (1.27 x)"),
        ("data", "data starvation", "its data loading"),
        ("offload", "offload-bound", "its updates and copies on the host take 80.0 ms longer"),
        ("step", "straggler", "its optimizer takes 80.0 ms longer"),
    ],
)
def test_the_part_that_takes_longer_is_the_reason(phase: str, what: str, says: str) -> None:
    run = a_run(step_ms=400)
    trained(run, {0: USUAL, 1: USUAL, 2: USUAL | {"reduce": 10.0, phase: USUAL.get(phase, 0.0) + 80.0}})
    met(run, last=2, wait_us=80_000)
    found = ask(find_straggler, run)
    assert found is not None and (found.what, found.ranks) == (what, (2,)) and says in found.text
    assert "the others wait for rank 2, 80.0 ms a step (20%)" in found.text


def test_a_lower_clock_and_other_processes_are_reasons() -> None:
    run = a_run(step_ms=400)
    trained(run, {0: USUAL, 1: USUAL, 2: USUAL | {"reduce": 10.0, "forward": 180.0}})
    met(run, last=2, wait_us=80_000)
    for rank in range(WORLD):
        run.apply(hello(rank).model_copy(update={"device_uuid": f"GPU-{rank}"}))
    gpus = [
        GpuStats(index=r, uuid=f"GPU-{r}", name="H", sm_clock_mhz=1200 if r == 2 else 1980, clock_reasons=["power cap"])
        for r in range(WORLD)
    ]
    node(run, gpus=gpus)
    found = ask(find_straggler, run)
    assert found is not None and "its SM clock is 1,200 MHz, the others' 1,980: power cap" in found.text
    history = History()
    for second in range(SAMPLES_KEPT):
        busy = [BusyProcess(pid=77, name="hog", cpu_percent=98.0)]
        node(run, rank_run_delay_percent={0: 2.0, 1: 3.0, 2: 60.0}, busy=busy, at_ns=second)
        figures = history.figures(run, None, float(second))
    found = find_straggler(figures)
    assert found is not None and (found.what, found.ranks) == ("contention", (2,))
    assert "it waited for a free CPU 60% of the time; busiest outside the run: hog (pid 77) 98%" in found.text


IRREGULAR_US = (60_000, 230_000, 90_000, 280_000, 50_000, 240_000, 70_000, 260_000, 90_000)
"""What the others wait for a rank in each step: so irregular a cost alone may be chance."""


def irregular(run: RunState, phase: str) -> None:
    trained(run, {0: USUAL, 1: USUAL, 2: USUAL | {"reduce": 10.0, phase: USUAL[phase] + 130.0}})
    for step, wait_us in enumerate(IRREGULAR_US, 11):
        met(run, last=2, wait_us=wait_us, steps=1, first=step)


def test_a_rank_that_the_kernel_lets_wait_is_named_on_half_the_evidence() -> None:
    run, history = a_run(step_ms=400), History()
    irregular(run, "forward")
    assert ask(find_straggler, run) is None
    for second in range(SAMPLES_KEPT):
        node(run, rank_run_delay_percent={0: 2.0, 1: 3.0, 2: 60.0}, at_ns=second)
        figures = history.figures(run, None, float(second))
    found = find_straggler(figures)
    assert found is not None and (found.what, found.ranks) == ("contention", (2,))


def test_so_is_one_that_spends_much_of_its_steps_on_data() -> None:
    run = a_run(step_ms=400)
    irregular(run, "data")
    found = ask(find_straggler, run)
    assert found is not None and (found.what, found.ranks) == ("data starvation", (2,))


def test_contention_of_all_ranks_blames_none_of_them() -> None:
    run, history = a_run(), History()
    for second in range(SAMPLES_KEPT):
        node(run, rank_run_delay_percent={0: 40.0, 1: 35.0, 2: 45.0}, at_ns=second)
        figures = history.figures(run, None, float(second))
    found = find_contention(figures)
    assert (
        found is not None
        and found.ranks == ()
        and "wait for a free CPU 40% of the time (load 1.5 on 8 CPUs)" in found.text
    )
    for second in range(SAMPLES_KEPT, SAMPLES_KEPT + SAMPLES_LONG):
        node(run, rank_run_delay_percent={0: 10.0, 1: 5.0, 2: 5.0}, at_ns=second)
        figures = history.figures(run, found, float(second))
        if second == 2 * SAMPLES_KEPT:
            assert find_contention(figures) is not None  # other processes come and go
    assert find_contention(figures) is None


def test_where_all_wait_for_cpus_only_a_rank_that_takes_far_longer_is_to_blame() -> None:
    for extra_ms, named in ((60.0, False), (260.0, True)):
        run, history = a_run(step_ms=400), History()
        trained(run, {0: USUAL, 1: USUAL, 2: USUAL | {"reduce": 10.0, "forward": 100.0 + extra_ms}})
        met(run, last=2, wait_us=80_000)
        assert ask(find_straggler, run) is not None
        for second in range(SAMPLES_KEPT):
            node(run, rank_run_delay_percent={0: 35.0, 1: 30.0, 2: 40.0}, at_ns=second)
            figures = history.figures(run, None, float(second))
        assert (find_straggler(figures) is not None) is named


def transferred(run: RunState, first: int, steps: int, transfer_us: int, blocked_us: int, group: str = "world") -> None:
    """Steps with eight transfers each, by each of which the training threads are blocked for `blocked_us`."""
    for step in range(first, first + steps):
        for rank in range(WORLD):
            records = [(8 * step + k, "all_gather", 8 * MIB, 0, 0, transfer_us + rank, blocked_us) for k in range(1, 9)]
            run.apply(Collectives(rank=rank, step=step, group=group, records=records))
    trained(run, {rank: {"forward": 300.0, "gather": 100.0} for rank in range(WORLD)}, steps, first)


def test_a_slow_link_is_measured_against_its_own_past() -> None:
    run = a_run(step_ms=400)
    transferred(run, 11, 30, 4_000, blocked_us=4_000)
    assert ask(find_slow_link, run) is None
    transferred(run, 41, 12, 14_000, blocked_us=14_000)
    found = ask(find_slow_link, run)
    assert found is not None and (found.what, found.ranks) == ("slow link", ())
    assert "transfers take 80.0 ms a step (20%) more" in found.text and "group" not in found.facts
    assert "all_gather of 8.00 MiB 14.0 ms, before 4.0 ms" in found.text and "MiB/s, best" in found.text


@pytest.mark.parametrize("exposed_us", [0, 8_000])
def test_slow_transfers_that_computing_hides_are_no_slow_link(exposed_us: int) -> None:
    run = a_run(step_ms=400)
    transferred(run, 11, 30, 4_000, exposed_us)
    transferred(run, 41, 12, 14_000, exposed_us)
    assert ask(find_slow_link, run) is None
    # They take 800 ms a step now, of 400 ms: all ranks wait for 100 ms longer than at first.
    transferred(run, 53, 12, 100_000, exposed_us + 12_500)
    found = ask(find_slow_link, run)
    assert found is not None and "transfers take 100 ms a step (25%) more" in found.text


def test_what_transfers_cost_at_first_is_known_in_long_runs_too() -> None:
    waits = Waits()
    for step in range(1, 3 * HISTORY_STEPS):
        slow_us = 0 if step < 2 * HISTORY_STEPS else 10_000
        for rank in range(WORLD):
            records = [(step, "all_gather", 8 * MIB, 0, 0, 20_000 + 2 * slow_us, 4_000 + slow_us)]
            waits.add(Collectives(rank=rank, step=step, records=records), WORLD)
    for known in (waits, waits.copy()):
        assert known.transfer_excess_ms(10) == [10.0] * 10


def test_a_slow_link_of_one_of_several_groups_names_the_group() -> None:
    run = a_run(step_ms=400)
    for group, slow_us in (("world", 4_000), ("replicas", 14_000)):
        transferred(run, 11, 30, 4_000, blocked_us=4_000, group=group)
        transferred(run, 41, 12, slow_us, blocked_us=slow_us, group=group)
    found = ask(find_slow_link, run)
    assert found is not None and "all_gather of 8.00 MiB in group replicas 14.0 ms" in found.text
    assert found.facts["group"] == "replicas"


def test_waits_without_bytes_are_not_called_a_transfer_of_0_bytes() -> None:
    """Those of trainers that are not ours at the end of backward."""
    run = a_run(step_ms=400)
    for first, steps, took_us in ((11, 30, 4_000), (41, 12, 14_000)):
        for step in range(first, first + steps):
            for rank in range(WORLD):
                records = [(8 * step + k, "end of backward", 0, 0, 0, took_us + rank, took_us) for k in range(8)]
                run.apply(Collectives(rank=rank, step=step, records=records))
        trained(run, {rank: {"forward": 300.0, "reduce": 100.0} for rank in range(WORLD)}, steps, first)
    found = ask(find_slow_link, run)
    assert found is not None and "than they did: end of backward 14.0 ms, before 4.0 ms" in found.text


def test_data_starvation_of_all_ranks() -> None:
    run = a_run(step_ms=400)
    trained(run, {rank: USUAL | {"data": 150.0} for rank in range(WORLD)})
    found = ask(find_data_starvation, run)
    assert found is not None and found.ranks == () and "150 ms of each step (27%)" in found.text
    calmer = a_run(step_ms=400)
    trained(calmer, dict.fromkeys(range(WORLD), USUAL))
    assert ask(find_data_starvation, calmer) is None
