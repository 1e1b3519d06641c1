"""The next peaks: what is coming, against what is free, and the alarm about fragmentation."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.host.memory_limits import check_host_memory
from runtime.wire.messages import Hello, Memory, PlannedMemory, RunStatus, StepResult
from runtime.wire.node import NodeStats
from tests.unit.state.test_stall import hello
from zerotop.state.forecast import Need, forecast, limits_of, most_pressing
from zerotop.state.fragmentation import fragmentation_text
from zerotop.state.memory import memory_use, peak_text, phase_peaks_text, planned_peak
from zerotop.state.run import RunState

GIB = 1 << 30
PLAN = PlannedMemory(
    device_bytes={"parameters": 2 * GIB, "activations": 10 * GIB, "logits": GIB, "context": GIB},
    shape_known=True,
    saved_bytes=GIB,
    comparison="ZeRO saves 1 GiB",
    checkpoint_bytes=8 * GIB,
    checkpoint_slots_bytes=GIB // 16,
    build_bytes=3 * GIB,
    consolidated_bytes=2 * GIB,
)


def memory(rank: int = 0, **changes: Any) -> Memory:
    known: dict[str, Any] = {"ledger": {"parameters": 2 * GIB}, "rss_bytes": 3 * GIB, "host_total_bytes": 64 * GIB}
    return Memory(**(known | {"rank": rank, "at_ns": 0} | changes))


def node(free: int, **changes: Any) -> NodeStats:
    known: dict[str, Any] = {
        "cpu_percent": 1,
        "cpu_count": 2,
        "load_1m": 1,
        "ram_used_bytes": 0,
        "at_ns": 0,
        "wall_s": 0,
    }
    return NodeStats(**(known | {"host": "a", "ram_total_bytes": 64 * GIB, "ram_available_bytes": free} | changes))


def a_run(
    free: int, steps: int = 3, *, world: int = 2, plan: PlannedMemory | None = PLAN, **of_memory: Any
) -> RunState:
    run = RunState()
    run.apply(RunStatus(name="q1", state="running"))
    for rank in range(world):
        said: Hello = hello(rank, world)
        run.apply(said.model_copy(update={"planned": plan, "knobs": {"checkpoint_interval": 500}, "steps": 2000}))
        run.apply(memory(rank, **of_memory))
        for step in range(1, steps + 1):
            run.apply(StepResult(rank=rank, step=step, loss=1, lr=1, grad_norm=1, step_ms=1, end_ns=0))
    run.apply(node(free))
    return run


def test_a_checkpoint_without_room_goes_through_slots_by_the_rule_of_the_checkpointer() -> None:
    run = a_run(free=10 * GIB)
    need = most_pressing(run)
    assert need is not None and need.short and need.certain and need.event == "checkpoint"
    assert need.need_bytes == 16 * GIB and need.free_bytes == 10 * GIB
    assert need.text.startswith(
        "the checkpoint at step 500 will need 16.0 GiB of host RAM, 10.0 GiB are free: it will be "
    )
    assert "through slots of 128 MiB" in need.text
    with pytest.raises(MemoryError):
        check_host_memory(8 * GIB, pin=False, local_world=2, limits=limits_of(run.nodes["a"]))


def test_with_room_it_is_only_said_and_with_its_copy_in_place_it_needs_nothing() -> None:
    need = most_pressing(a_run(free=40 * GIB))
    assert (
        need is not None
        and not need.short
        and need.text
        == ("the checkpoint at step 500 will need 16.0 GiB of host RAM for its copy on a, 40.0 GiB are free")
    )
    there = forecast(a_run(free=GIB, offloaded={"snapshot": 8 * GIB}))
    assert "checkpoint" not in {one.event for one in there}


def test_the_limit_of_the_control_group_counts() -> None:
    run = a_run(free=40 * GIB)
    run.apply(node(12 * GIB, cgroup_limit_bytes=20 * GIB, cgroup_used_bytes=8 * GIB))
    need = most_pressing(run)
    assert need is not None and need.short and need.free_bytes == 12 * GIB


@pytest.mark.parametrize(
    ("knobs", "text", "certain"),
    [
        ({"checkpoint_interval": 0, "checkpoint_minutes": 10}, "the next checkpoint", True),
        ({"checkpoint_interval": 0, "checkpoint_minutes": 0}, "a checkpoint", False),
        ({"checkpoint_interval": 5000}, "the checkpoint at step 2000", True),
    ],
)
def test_when_the_next_checkpoint_is_due(knobs: dict[str, int], text: str, certain: bool) -> None:
    run = a_run(free=10 * GIB)
    first = run.ranks[0].hello
    assert first is not None
    run.apply(first.model_copy(update={"knobs": knobs}))
    need = next(one for one in forecast(run) if one.event == "checkpoint")
    assert need.text.startswith(f"{text} will need") and need.certain == certain


def test_the_first_step_of_a_cpu_rank_writes_to_pages_that_are_only_reserved() -> None:
    need = next(one for one in forecast(a_run(free=5 * GIB, steps=0, untouched_bytes=3 * GIB)) if one.event == "step")
    assert need.need_bytes == 6 * GIB and need.short
    assert need.text == "the first optimizer step will need 6.00 GiB more of host RAM on a, only 5.00 GiB are free"
    assert not [one for one in forecast(a_run(free=5 * GIB, untouched_bytes=3 * GIB)) if one.event == "step"]


def test_the_first_step_of_a_gpu_needs_what_the_plan_has_beyond_what_is_allocated() -> None:
    on_gpu = {"allocated_bytes": 2 * GIB, "reserved_bytes": 3 * GIB, "device_used_bytes": 4 * GIB}
    run = a_run(40 * GIB, 0, world=1, **on_gpu, device_total_bytes=12 * GIB)
    need = next(one for one in forecast(run) if one.event == "step")
    assert (need.place, need.need_bytes, need.free_bytes, need.short) == ("rank 0", 11 * GIB, 9 * GIB, True)
    unknown = PLAN.model_copy(update={"shape_known": False})
    of_unknown = a_run(40 * GIB, 0, world=1, plan=unknown, **on_gpu, device_total_bytes=12 * GIB)
    assert not [one for one in forecast(of_unknown) if one.event == "step"]


def test_what_only_a_person_or_a_failure_brings_is_not_shown_unless_it_does_not_fit() -> None:
    run = a_run(free=GIB, offloaded={"snapshot": 8 * GIB})
    assert [(one.event, one.certain) for one in forecast(run)] == [("restart", False), ("consolidated", False)]
    need = most_pressing(run)
    assert need is not None and need.event == "restart" and need.short
    assert most_pressing(a_run(free=40 * GIB, offloaded={"snapshot": 8 * GIB})) is None


def test_nothing_is_forecast_without_figures_or_after_the_end() -> None:
    assert forecast(RunState()) == []
    assert forecast(a_run(free=GIB, plan=None)) == []
    old = a_run(free=GIB)
    old.apply(node(0).model_copy(update={"ram_available_bytes": None}))
    assert forecast(old) == []
    run = a_run(free=GIB)
    run.apply(RunStatus(name="q1", state="finished"))
    assert forecast(run) == []


# ---- the parts and their peaks ---------------------------------------------------------------------------------------
def test_the_parts_of_a_cpu_rank_are_its_rss_and_what_is_not_written_yet() -> None:
    parts = {"imports": GIB, "libraries": GIB // 4, "activations": GIB // 2, "allocator": GIB // 4, "novel": GIB // 8}
    use = memory_use(memory(rss_parts=parts, untouched_bytes=GIB, rss_bytes=25 * GIB // 8, offloaded={"snapshot": 0}))
    assert dict(use.parts) == {
        "parameters": 2 * GIB, "activations": GIB // 2, "cache": GIB // 4, "imports": GIB, "libraries": GIB // 4,
        "other": GIB // 8,
    }  # fmt: skip
    assert sum(dict(use.parts).values()) - use.untouched_bytes == use.used_bytes == 25 * GIB // 8


def test_a_peak_stands_beside_the_figure_of_the_plan() -> None:
    one = memory(rss_parts={"imports": GIB}, peak_bytes={"init": 99 * GIB, "forward": 12 * GIB, "backward": 14 * GIB})
    assert planned_peak(one, PLAN) == 14 * GIB and planned_peak(one, None) is None
    assert peak_text(one, PLAN) == "peak 14.0 GiB in backward, plan 14.0 GiB"
    assert peak_text(one, PLAN.model_copy(update={"shape_known": False})) == "peak 14.0 GiB in backward"
    assert peak_text(memory(), PLAN) == ""


# ---- fragmentation ---------------------------------------------------------------------------------------------------
def test_retries_with_much_free_memory_are_fragmentation_and_retries_of_a_full_gpu_are_not() -> None:
    gpu = {"allocated_bytes": 60 * GIB, "reserved_bytes": 72 * GIB, "alloc_retries": 4, "inactive_split_bytes": 6 * GIB}
    text = fragmentation_text(3, memory(3, **gpu), retries_before=1)
    assert text.startswith("rank 3: ") and "tried again 3 times" in text and "12.0 GiB (17%) of the 72.0 GiB" in text
    assert "expandable_segments:True" in text
    assert not fragmentation_text(3, memory(3, **gpu), retries_before=4)
    full = gpu | {"allocated_bytes": 71 * GIB, "inactive_split_bytes": 0}
    assert not fragmentation_text(3, memory(3, **full), retries_before=1)
    assert not fragmentation_text(0, memory(), 0)


def test_logits_are_a_part_of_their_own_and_the_sum_stays() -> None:
    parts = {"imports": GIB, "activations": 3 * GIB}
    plain = memory_use(memory(rss_parts=parts, rss_bytes=6 * GIB))
    use = memory_use(memory(rss_parts=parts, rss_bytes=6 * GIB, logits_bytes=GIB))
    assert dict(use.parts) == dict(plain.parts) | {"activations": 2 * GIB, "logits": GIB}
    assert sum(dict(use.parts).values()) == sum(dict(plain.parts).values())
    freed = memory_use(memory(rss_parts=parts, rss_bytes=6 * GIB, logits_bytes=5 * GIB))  # measured a moment earlier
    assert dict(freed.parts)["logits"] == 3 * GIB and "activations" not in dict(freed.parts)
    peaks = {"peak_bytes": {"forward": 9 * GIB}, "activation_bytes": {"forward": 3 * GIB}}
    text = "peaks: forward 9.00 GiB; activations: forward 3.00 GiB"
    assert phase_peaks_text(memory(**peaks)) == text
    assert phase_peaks_text(memory(**peaks, logits_peak_bytes=GIB)) == f"{text}; of them logits at most 1.00 GiB"
    on_gpu = memory_use(memory(allocated_bytes=5 * GIB, reserved_bytes=6 * GIB, logits_bytes=2 * GIB))
    assert (dict(on_gpu.parts)["activations"], dict(on_gpu.parts)["logits"]) == (GIB, 2 * GIB)


EVALUATES = PLAN.model_copy(update={"evaluation_bytes": 3 * GIB, "evaluation_interval": 100})


def evaluation(run: RunState) -> Need | None:
    return next((one for one in forecast(run) if one.event == "evaluation"), None)


def test_the_next_evaluation_is_said_less_what_malloc_keeps() -> None:
    need = evaluation(a_run(free=40 * GIB, plan=EVALUATES, rss_parts={"allocator": GIB}))
    assert need is not None and need.certain and not need.short
    assert need.text == "the evaluation at step 100 will need 4.00 GiB more of host RAM on a, 40.0 GiB are free"
    first = evaluation(a_run(free=5 * GIB, steps=0, plan=EVALUATES))
    assert first is not None and first.short
    assert first.text.startswith("the evaluation before the first step will need 6.00 GiB more of host RAM on a, only ")
    assert evaluation(a_run(free=GIB)) is None  # this run has none
    done = a_run(free=GIB, plan=EVALUATES, steps=3)
    hello_0 = done.ranks[0].hello
    assert hello_0 is not None
    done.apply(hello_0.model_copy(update={"steps": 3}))
    assert evaluation(done) is None


def test_an_evaluation_on_a_gpu_needs_its_memory() -> None:
    figures = {"allocated_bytes": 5 * GIB, "reserved_bytes": 7 * GIB, "device_used_bytes": 9 * GIB}
    run = a_run(free=40 * GIB, world=1, plan=EVALUATES, device_total_bytes=10 * GIB, **figures)
    need = evaluation(run)
    assert need is not None and (need.place, need.need_bytes, need.free_bytes) == ("rank 0", 3 * GIB, 3 * GIB)


def test_an_export_is_said_if_there_is_no_room_for_it() -> None:
    plan = PLAN.model_copy(update={"export_bytes": 6 * GIB, "checkpoint_bytes": 0, "consolidated_bytes": 0})
    need = next(one for one in forecast(a_run(free=5 * GIB, plan=plan)) if one.event == "export")
    assert need.short and not need.certain
    assert need.text == "zerotop export will need 6.00 GiB of host RAM on a, only 5.00 GiB are free"
