"""What binds a run (memory, offload, throttled GPUs), and what it does when nothing is wrong: as test_rules.py."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Goodbye, Memory, RunStatus
from runtime.wire.node import GpuStats
from tests.unit.state.test_stall import WORLD, a_run, beat, hello, stuck
from tests.unit.verdict.test_rules import MIB, USUAL, ask, met, node, trained
from zerotop.state.run import RunState
from zerotop.verdict.bound import find_gpu_fault, find_memory_bound, find_offload_bound, find_throttled
from zerotop.verdict.calm import calm
from zerotop.verdict.figures import SAMPLES_KEPT, History
from zerotop.verdict.finding import Finding
from zerotop.verdict.judge import Judge, Rule
from zerotop.verdict.slow import find_contention, find_data_starvation
from zerotop.verdict.straggler import find_straggler


# ---- bound -------------------------------------------------------------------------------------------------------
def remember(run: RunState, rank: int, **counters: int) -> None:
    values = {"ledger": {}, "rss_bytes": 1, "host_total_bytes": 2, "at_ns": 1}
    run.apply(Memory(rank=rank, **values, **counters))  # type: ignore[arg-type]


def test_allocator_retries_are_memory_trouble() -> None:
    run, history = a_run(), History()
    remember(run, 1, alloc_retries=4)
    assert find_memory_bound(history.figures(run, None, 0.0)) is None
    remember(run, 1, alloc_retries=7)
    found = find_memory_bound(history.figures(run, None, 10.0))
    assert found is not None and found.ranks == (1,) and "freed its cache 3 times in the last 10 s" in found.text
    assert find_memory_bound(history.figures(run, None, 60.0)) is None


def test_paging_is_memory_trouble_and_reading_a_file_is_not() -> None:
    run, history = a_run(), History()
    remember(run, 0, major_faults=0)
    history.figures(run, None, 0.0)
    remember(run, 0, major_faults=10_000)
    node(run)
    assert find_memory_bound(history.figures(run, None, 10.0)) is None
    node(run, swap_in_bytes_per_s=8.0 * MIB)
    found = find_memory_bound(history.figures(run, None, 10.0))
    assert (
        found is not None
        and found.ranks == (0,)
        and "1,000 pages a second" in found.text
        and "8.00 MiB/s" in found.text
    )


def waits_for_files(phases: dict[str, float]) -> tuple[RunState, History, Finding]:
    """Rank 2, whose phases take so long, reads a thousand pages a second, and what is found then."""
    run, history = a_run(step_ms=400), History()
    trained(run, {0: USUAL, 1: USUAL, 2: USUAL | {"reduce": 10.0} | phases})
    met(run, last=2, wait_us=80_000)
    remember(run, 2, major_faults=0)
    history.figures(run, None, 0.0)
    remember(run, 2, major_faults=10_000)
    found = find_straggler(history.figures(run, None, 10.0))
    assert found is not None and "it reads 1,000 pages a second of mapped files from disk" in found.text
    return run, history, found


def test_a_rank_that_waits_for_files_on_disk_has_slow_data_for_that_reason() -> None:
    run, history, found = waits_for_files({"data": 82.0})
    assert found.what == "data starvation" and "more memory" in found.advice
    remember(run, 2, major_faults=10_001)
    quiet = find_straggler(history.figures(run, None, 30.0))
    assert quiet is not None and "pages" not in quiet.text


def test_a_rank_that_waits_for_files_on_disk_while_it_computes_has_too_little_memory() -> None:
    run, history, found = waits_for_files({"forward": 180.0})
    assert found.what == "memory-bound" and found.ranks == (2,)
    assert "its forward and backward take 80.0 ms longer" in found.text
    # The host as a whole has memory: that rule must not take it over with another sentence.
    assert find_memory_bound(history.figures(run, found, 10.5)) is None


def test_paging_is_told_within_seconds_and_outlives_a_pause_of_it() -> None:
    run, history, faults = a_run(), History(), 0
    node(run, memory_pressure_percent=40.0)
    told: list[bool] = []
    found = None
    for second in range(60):
        faults += 200 if 30 <= second < 40 else 0  # a fifth of the limit over the half minute before
        remember(run, 0, major_faults=faults)
        found = find_memory_bound(history.figures(run, found, float(second)))
        told.append(found is not None)
    assert not any(told[:30]) and told.index(True) <= 33 and all(told[33:55])


def test_a_throttled_gpu_is_named_with_its_reason() -> None:
    run = a_run()
    for rank in range(WORLD):
        run.apply(hello(rank).model_copy(update={"device_uuid": f"GPU-{rank}"}))
        beat(run, rank, 1, 1, 0.0)

    def gpus(clock: float, reasons: list[str]) -> list[GpuStats]:
        return [
            GpuStats(
                index=rank,
                uuid=f"GPU-{rank}",
                name="H",
                sm_clock_mhz=clock if rank == 1 else 1980.0,
                max_sm_clock_mhz=1980.0,
                temperature_c=93.0,
                clock_reasons=reasons if rank == 1 else [],
            )
            for rank in range(WORLD)
        ]

    node(run, gpus=gpus(1200.0, ["hot (hardware)"]))
    found = ask(find_throttled, run)
    assert found is not None and found.ranks == (1,) and "hot (hardware)" in found.text and "93 °C" in found.text
    node(run, gpus=gpus(1950.0, ["power cap"]))
    assert ask(find_throttled, run) is None  # all large GPUs are at it under full load
    node(run, gpus=gpus(1200.0, ["power cap"]))
    assert ask(find_throttled, run) is not None  # but it is slower than the others
    node(run, gpus=gpus(1200.0, []))
    assert ask(find_throttled, run) is None  # idle: nothing holds it down
    assert ask(find_gpu_fault, run) is None
    node(run, gpus=[GpuStats(index=1, uuid="GPU-1", name="H", lost=True)])
    found = ask(find_gpu_fault, run)
    assert found is not None and found.ranks == (1,) and "the driver has lost it" in found.text


def test_an_xid_after_which_a_gpu_is_not_to_be_trusted_is_a_gpu_fault() -> None:
    run = a_run()
    for rank in range(WORLD):
        run.apply(hello(rank).model_copy(update={"device_uuid": f"GPU-{rank}"}))
        beat(run, rank, 1, 1, 0.0)
    xid = {"xid": 94, "xid_text": "XID 94: GPU memory lost data", "xid_wall_s": 5.0}
    node(run, gpus=[GpuStats(index=r, uuid=f"GPU-{r}", name="H", **(xid if r == 1 else {})) for r in range(WORLD)])
    found = ask(find_gpu_fault, run)
    assert found is not None and (found.ranks, found.severity) == ((1,), "error")
    assert found.text == "the GPU of rank 1: XID 94: GPU memory lost data" and found.facts == {"concern": "XID 94"}


def test_steps_that_wait_for_the_host_are_offload_bound() -> None:
    run = a_run()
    trained(run, {rank: USUAL | {"offload": 300.0} for rank in range(WORLD)})
    found = ask(find_offload_bound, run)
    assert found is not None and found.severity == "info" and "300 ms of each step (43%)" in found.text


@pytest.mark.parametrize("rule", [find_offload_bound, find_data_starvation])
def test_what_all_ranks_wait_for_is_told_after_a_few_steps_and_a_pause_is_not(rule: Rule) -> None:
    phase = "offload" if rule is find_offload_bound else "data"
    run = a_run()
    trained(run, dict.fromkeys(range(WORLD), USUAL), steps=20)
    trained(run, {rank: USUAL | {phase: 9_000.0} for rank in range(WORLD)}, steps=1, first=31)
    assert ask(rule, run) is None
    trained(run, dict.fromkeys(range(WORLD), USUAL), steps=20, first=32)
    trained(run, {rank: USUAL | {phase: 180.0} for rank in range(WORLD)}, steps=4, first=52)
    assert ask(rule, run) is None
    trained(run, {rank: USUAL | {phase: 180.0} for rank in range(WORLD)}, steps=1, first=56)
    assert ask(rule, run) is not None


# ---- calm --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "phase", "what"),
    [
        ("running", "backward", "healthy"),
        ("running", "checkpoint", "checkpoint"),
        ("running", "eval", "evaluation"),
        ("paused", "paused", "paused"),
        ("starting", "init", "starting"),
        ("finished", "idle", "ended"),
    ],
)
def test_what_a_run_does_when_nothing_is_wrong(state: str, phase: str, what: str) -> None:
    run = a_run(state=state)
    trained(run, dict.fromkeys(range(WORLD), USUAL))
    for rank in range(WORLD):
        beat(run, rank, 1, 1, 0.0, phase=phase)
    found = calm(History().figures(run, None, 0.0))
    assert (found.what, found.severity) == (what, "info")
    if what == "healthy":
        assert found.text == "healthy: 400 ms a step, 75% compute, 20% waiting"


@pytest.mark.parametrize(
    ("reported", "text"),
    [
        ((), "the ranks are starting; rank 0: loading weights: 43%"),
        ((1, 2), "the ranks are starting; rank 0: loading weights: 43%"),
        ((0, 1), "the ranks are starting: rank 2 has not reported yet"),
    ],
)
def test_a_start_says_what_it_is_at(reported: tuple[int, ...], text: str) -> None:
    run = RunState()
    run.apply(RunStatus(name="q1", state="starting", doing="loading weights: 43%"))
    for rank in reported:
        run.apply(hello(rank))
    found = calm(History().figures(run, None, 0.0))
    assert (found.what, found.text) == ("starting", text)


def test_a_recompilation_is_no_hang_and_is_told_with_its_rank() -> None:
    run = a_run(steps=500)
    trained(run, dict.fromkeys(range(WORLD), USUAL), first=501)
    stuck(run, idle_s=14.0)
    judge = Judge()
    assert judge.look(run, 0.0).what == "hang"
    beat(run, 1, 1531, 1531, 14.0, compiling=True)
    assert judge.look(run, 0.5).what == "compiling"
    found = calm(History().figures(run, None, 0.0))
    assert (found.what, found.severity) == ("compiling", "info")
    assert found.text == "torch.compile compiles on rank 1, for 14 s so far"


def test_a_compilation_of_a_moment_is_not_worth_a_word() -> None:
    run, judge = a_run(steps=500), Judge()
    trained(run, dict.fromkeys(range(WORLD), USUAL), first=501)
    for compiling, now_s, what in ((False, 0.0, "healthy"), (True, 1.0, "healthy"), (True, 3.5, "compiling")):
        for rank in range(WORLD):
            beat(run, rank, 1, 1, 0.5, compiling=compiling)
        assert judge.look(run, now_s).what == what


def test_a_run_that_all_ranks_have_left_is_neither_starting_nor_short_of_cpus() -> None:
    run, history = a_run(), History()
    for rank in range(WORLD):
        beat(run, rank, 1, 1, 0.0)
        run.apply(Goodbye(rank=rank, outcome="failed", step=10, wall_s=0.0))
    for second in range(SAMPLES_KEPT):
        node(run, rank_run_delay_percent={0: 40.0, 1: 35.0, 2: 45.0}, at_ns=second)
        figures = history.figures(run, None, float(second))
    assert find_contention(figures) is None
    assert calm(figures).text == "all ranks have left; the supervisor is finding out why"
