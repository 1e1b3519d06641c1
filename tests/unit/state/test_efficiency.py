"""MFU, achieved TFLOPS, and the ceiling that binds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from runtime.wire.messages import Collectives, RunStatus
from runtime.wire.node import GpuStats, NodeStats
from tests.harness.fakehub import hello, step_result
from zerotop.documents import status_document, status_text
from zerotop.state.efficiency import efficiency_of, rank_efficiency, run_efficiency
from zerotop.state.roofline import Measured, ceiling_of, measured_ranks, rank_ceiling, run_ceiling
from zerotop.state.run import RunState
from zerotop.state.timereport import time_report


def state_of(ranks: int = 2, **figures: Any) -> RunState:
    """Ranks on an H100 with a model of 10 GFLOPs per token, 40,000 tokens/s each."""
    state = RunState()
    state.apply(RunStatus(name="r1", state="running", attempt=1))
    known: dict[str, Any] = {"model_flops_per_token": 1e10, "hardware_flops_per_token": 1.3e10, "peak_flops": 1e15}
    for rank in range(ranks):
        state.apply(hello(rank, device=f"cuda:{rank}", world_size=ranks, **{**known, **figures}))
        state.apply(step_result(rank, 5, tokens_per_s=4e4, phase_ms={"forward": 90.0, "step": 10.0}))
    return state


def test_mfu_is_tokens_times_flops_over_the_peak() -> None:
    found = run_efficiency(state_of())
    assert (found.tflops, found.mfu, found.hfu) == (400.0, pytest.approx(0.4), pytest.approx(0.52))
    assert found.text == "40.0% MFU (52.0% HFU), 400 TFLOPS"


def test_without_a_peak_there_is_no_mfu_and_a_reason() -> None:
    found = run_efficiency(state_of(peak_flops=None, peak_note="the peak of this CPU is not known"))
    assert (found.tflops, found.mfu) == (400.0, None)
    assert found.text == "400 TFLOPS, MFU n/a: the peak of this CPU is not known"
    assert efficiency_of(hello(0), 1e4).text == "MFU n/a: the FLOPs of this model are not known"
    assert efficiency_of(None, None).mfu is None


def test_recent_steps_count_by_their_median() -> None:
    state = state_of(1)
    for step in range(6, 16):
        state.apply(step_result(0, step, tokens_per_s=5e4 if step != 15 else 1.0))  # the last one had a hiccup
    assert rank_efficiency(state, state.ranks[0]).mfu == pytest.approx(0.5)


def test_status_has_the_figures() -> None:
    state = state_of()
    document = status_document(state)
    assert document["mfu"] == pytest.approx(0.4)
    assert document["model_tflops"] == 400.0
    assert [rank["mfu"] for rank in document["ranks"]] == [pytest.approx(0.4)] * 2
    assert document["ceiling"] == "compute"
    assert "40.0% MFU (52.0% HFU), 400 TFLOPS, mean per device\nceiling: compute: " in status_text(document)
    unknown = status_document(RunState())
    assert (unknown["mfu"], unknown["ceiling"], unknown["ceiling_text"]) == (None, None, "")


STEP = Measured(step_ms=1000.0, mfu=0.45)


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({}, "compute", "compute: 100% of the step is the device's own work, at 45.0% MFU"),
        ({"data": 0.5}, "host", "host: 50% of the step (500 ms) passes outside of the engine"),
        (
            {"transfer": 0.4, "bus_bytes_per_s": 12 * 2**30},
            "network",
            "network: 40% of the step (400 ms) waits for transfers of collectives, which run at 12.0 GiB/s",
        ),
        ({"waiting": 0.3, "transfer": 0.2}, "peers", "other ranks: 30% of the step"),
        ({"offload": 0.6}, "PCIe", "PCIe: 60% of the step"),
        ({"offload": 0.6, "pcie": 0.9}, "PCIe", "the link is 90% busy"),
        ({"offload": 0.6, "pcie": 0.1}, "host", "PCIe is only 10% busy"),
        ({"offload": 0.6, "on_gpu": False}, "host", "updates of offloaded states on the CPU"),
        ({"mfu": 0.15, "memory_active": 0.8}, "device memory", "its memory is active 80% of the time at 15.0% MFU"),
        ({"mfu": 0.12, "data": 0.1}, "unknown", "no ceiling is reached: 90% of the step is the device's own work"),
        ({"mfu": None}, "unknown", "compute or device memory: "),
        ({"mfu": None, "on_gpu": False}, "compute", "on a CPU"),
    ],
)
def test_ceilings(changes: dict[str, Any], name: str, said: str) -> None:
    ceiling = ceiling_of(dataclasses.replace(STEP, **changes))
    assert ceiling is not None
    assert ceiling.name == name
    assert said in ceiling.text


def test_no_step_has_no_ceiling() -> None:
    assert ceiling_of(Measured(step_ms=0.0)) is None
    assert run_ceiling(RunState()) is None


def test_the_rank_that_waits_least_has_the_ceiling_of_the_run() -> None:
    """Rank 1 loads data for 60 of 100 ms; rank 0 waits for it in the collective."""
    state = state_of()
    for step in range(6, 30):
        for rank, duration_us in ((0, 61_000), (1, 1_000)):
            record = (step, "all_reduce", 10**6, 0, 0, duration_us, duration_us)
            state.apply(Collectives(rank=rank, step=step, records=[record]))
        for rank, data_ms, wait_ms in ((0, 1.0, 61.0), (1, 60.0, 1.0)):
            phases, waits = {"data": data_ms, "forward": 38.0, "step": wait_ms}, {"step": wait_ms}
            state.apply(step_result(rank, step, phase_ms=phases, phase_wait_ms=waits, wait_ms=wait_ms))
    mine, his = rank_ceiling(state, 0), rank_ceiling(state, 1)
    assert mine is not None and his is not None
    assert (mine.name, his.name) == ("peers", "host")
    assert run_ceiling(state) == his


def test_what_the_driver_says_of_the_gpu_counts() -> None:
    state = state_of(1, device_uuid="GPU-1", hardware_flops_per_token=1e10, peak_flops=4e15)  # 10% MFU
    state.apply(step_result(0, 6, tokens_per_s=4e4, phase_ms={"forward": 40.0, "offload": 60.0}))
    figures: dict[str, Any] = {"index": 0, "uuid": "GPU-1", "name": "x", "pcie_generation": 4, "pcie_width": 16}
    node: dict[str, Any] = {"host": "box", "cpu_percent": 1.0, "cpu_count": 2, "load_1m": 0.0, "ram_used_bytes": 1}
    node |= {"ram_total_bytes": 2, "at_ns": 0, "wall_s": 0}
    busy = GpuStats(**figures, pcie_tx_bytes_per_s=1e9, pcie_rx_bytes_per_s=25.2e9, dram_activity_percent=70.0)
    state.apply(NodeStats(**node, gpus=[busy]))
    ceiling = rank_ceiling(state, 0)
    assert ceiling is not None
    assert (ceiling.name, "the link is 80% busy" in ceiling.text) == ("PCIe", True)
    for step in range(7, 40):
        state.apply(step_result(0, step, tokens_per_s=4e4, phase_ms={"forward": 100.0}))
    ceiling = rank_ceiling(state, 0)
    assert ceiling is not None
    assert (ceiling.name, "active 70% of the time at 10.0% MFU" in ceiling.text) == ("device memory", True)


def test_who_comes_late_uses_the_hubs_report_until_he_has_seen_as_much() -> None:
    """Rank 1 loads data; of it a late status has one step, and no collective that tells waiting from transfer."""
    hub = state_of()
    for step in range(6, 30):
        for rank, duration_us in ((0, 61_000), (1, 1_000)):
            hub.apply(
                Collectives(rank=rank, step=step, records=[(step, "all_reduce", 10**6, 0, 0, duration_us, duration_us)])
            )
        times = {0: (60.0, 1.0), 1: (1.0, 61.0)} if step == 29 else {0: (1.0, 61.0), 1: (60.0, 1.0)}
        for rank, (data_ms, wait_ms) in times.items():  # in the newest step it is the other way round
            phases, waits = {"data": data_ms, "forward": 38.0, "step": wait_ms}, {"step": wait_ms}
            hub.apply(step_result(rank, step, phase_ms=phases, phase_wait_ms=waits, wait_ms=wait_ms))
    hub.apply(time_report(hub) or RunStatus(name="r1", state="running"))
    late = RunState()
    late.apply_all(hub.snapshot_messages(), 0)
    assert late.breakdowns.steps(1) == 1
    mine, his = rank_ceiling(late, 0), rank_ceiling(late, 1)
    assert mine is not None and his is not None and (mine.name, his.name) == ("peers", "host")
    assert late.time_report is not None
    assert measured_ranks(late)[0].bus_bytes_per_s == late.time_report.bus_bytes_per_s == pytest.approx(1e9)
