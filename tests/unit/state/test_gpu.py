"""What is out of order about a GPU, the facts for verdicts, and energy per step from counters."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.wire.messages import Snapshot
from runtime.wire.node import GpuStats, NodeStats
from tests.harness.fakehub import hello, step_result
from zerotop.format import byte_rate_text, energy_text
from zerotop.state.frozen_view import freeze
from zerotop.state.gpu import concerns, gpu_concerns
from zerotop.state.gpu_text import gpu_items, missing_text
from zerotop.state.memory import gpu_of
from zerotop.state.run import RunState

SECOND = 10**9
HEALTHY: dict[str, Any] = {
    "name": "NVIDIA H200", "utilization_percent": 97, "power_w": 650, "power_limit_w": 700, "temperature_c": 61,
    "slowdown_temperature_c": 87, "sm_clock_mhz": 1980, "max_sm_clock_mhz": 1980, "pcie_generation": 5,
    "max_pcie_generation": 5, "pcie_width": 16, "max_pcie_width": 16, "ecc_uncorrected": 0,
}  # fmt: skip


def gpu(index: int = 0, **changes: Any) -> GpuStats:
    return GpuStats(**{**HEALTHY, "index": index, "uuid": f"GPU-{index}", **changes})


def node(*gpus: GpuStats, at_s: float = 0.0, host: str = "box") -> NodeStats:
    return NodeStats(
        host=host, cpu_percent=1, cpu_count=8, load_1m=0, ram_used_bytes=1, ram_total_bytes=2, gpus=list(gpus),
        at_ns=int(at_s * SECOND), wall_s=1.0,
    )  # fmt: skip


def a_run(*gpus: GpuStats) -> RunState:
    state = RunState()
    for rank in range(len(gpus)):
        state.apply(hello(rank, world_size=len(gpus), device=f"cuda:{rank}", device_uuid=f"GPU-{rank}"))
    state.apply(node(*gpus))
    return state


def words(state: RunState) -> dict[int, list[str]]:
    return {rank: [concern.word for concern in those] for rank, those in concerns(state).items()}


# ---- what is out of order -------------------------------------------------------------------------------------------
def test_healthy_gpus_are_no_concern_at_their_power_cap_either() -> None:
    capped = {"clock_reasons": ["power cap"], "sm_clock_mhz": 1500, "power_w": 700}
    assert words(a_run(*(gpu(index) for index in range(8)))) == {}
    assert words(a_run(*(gpu(index, **capped) for index in range(8)))) == {}
    assert words(a_run(gpu(0, **capped))) == {}


def test_a_power_cap_that_holds_one_gpu_below_the_others_is_named_with_figures() -> None:
    capped = gpu(3, clock_reasons=["power cap"], sm_clock_mhz=1200, power_w=500, power_limit_w=500)
    state = a_run(gpu(0), gpu(1), gpu(2), capped)
    assert words(state) == {3: ["power cap"]}
    text = concerns(state)[3][0].text
    assert "1,200 of 1,980 MHz" in text and "1,980 MHz: power cap (500 of 500 W)" in text
    other = gpu(3, clock_reasons=["power cap"], sm_clock_mhz=1200, name="NVIDIA A100")
    assert words(a_run(gpu(0), gpu(1), other)) == {}  # another model has other clocks


@pytest.mark.parametrize(
    ("changes", "word", "severity", "part"),
    [
        ({"lost": True}, "lost", "error", "reboot"),
        ({"stale_fields": ["power_w"], "stale_s": 9.0}, "no answer", "warning", "dmesg"),
        ({"ecc_uncorrected": 2}, "ECC errors", "error", "2 ECC errors"),
        ({"xid": 119, "xid_text": "XID 119: no answer; reset it"}, "XID 119", "error", "no answer; reset it"),
        ({"row_remap_failed": True}, "bad memory", "error", "out of use"),
        ({"row_remap_pending": True}, "reset pending", "warning", "reset the GPU"),
        ({"clock_reasons": ["hot (hardware)"], "temperature_c": 88}, "hot", "warning", "88 °C (slows down at 87 °C)"),
        ({"clock_reasons": ["power brake"]}, "power brake", "warning", "power supply"),
        ({"clock_reasons": ["hardware slowdown"]}, "slowed down", "warning", "cooling"),
        ({"pcie_width": 8}, "PCIe x8", "warning", "8 of 16 lanes"),
        ({"pcie_generation": 3}, "PCIe gen 3", "warning", "generation 3 of 5"),
    ],
)
def test_each_fault_has_a_word_a_text_and_a_severity(
    changes: dict[str, Any], word: str, severity: str, part: str
) -> None:
    (found,) = gpu_concerns(gpu(**changes))
    assert (found.word, found.severity) == (word, severity)
    assert part in found.text and len(found.word) <= 14


def test_an_xid_from_before_the_rank_began_has_not_kept_it_from_running() -> None:
    for wall_s, found in ((99.0, {}), (101.0, {0: ["XID 94"]})):
        state = a_run(gpu(0, xid=94, xid_text="XID 94", xid_wall_s=wall_s))
        state.apply(hello(0, world_size=1, device="cuda:0", device_uuid="GPU-0", wall_s=100.0))
        assert words(state) == found
    assert [one.word for one in gpu_concerns(gpu(xid=79, lost=True))] == ["lost", "XID 79"]


def test_an_idle_gpu_may_lower_the_generation_of_its_link_but_not_its_width() -> None:
    assert gpu_concerns(gpu(utilization_percent=0, pcie_generation=1)) == ()
    assert gpu_concerns(gpu(utilization_percent=None, pcie_generation=1)) == ()
    assert [one.word for one in gpu_concerns(gpu(utilization_percent=0, pcie_width=4))] == ["PCIe x4"]


def test_corrected_errors_and_clocks_that_the_user_set_are_no_concern() -> None:
    assert gpu_concerns(gpu(stale_fields=["sm_activity_percent"], stale_s=9.0)) == ()
    assert gpu_concerns(gpu(ecc_corrected=400, remapped_rows=3, clock_reasons=["application clocks"])) == ()


def test_a_gpu_of_which_nothing_is_known_is_no_concern() -> None:
    assert gpu_concerns(GpuStats(index=0, uuid="GPU-0", name="x", clock_reasons=["power cap"]), 1980.0) == ()


# ---- facts ----------------------------------------------------------------------------------------------------------
def test_the_facts_of_a_rank_are_found_by_uuid() -> None:
    state = a_run(gpu(0), gpu(1, sm_clock_mhz=1200, clock_reasons=["power cap"]))
    facts = gpu_of(state, state.ranks[1])
    assert facts is not None
    assert (facts.sm_clock_mhz, facts.max_sm_clock_mhz, facts.clock_reasons) == (1200, 1980, ["power cap"])
    assert (facts.power_w, facts.power_limit_w, facts.temperature_c) == (650, 700, 61)
    assert gpu_of(state, state.rank(7)) is None
    state.apply(hello(1, device="cuda:0", device_uuid="MIG-1"))
    assert gpu_of(state, state.ranks[1]) is None


def test_the_words_for_what_is_missing_tell_why() -> None:
    stale = gpu(stale_fields=["pcie_tx_bytes_per_s", "pcie_rx_bytes_per_s", "sm_activity_percent"], stale_s=12.3)
    assert missing_text(stale) == "n/a since 12 s: PCIe, SM"
    assert missing_text(gpu(no_permission=["ecc_corrected", "power_w"])) == "no permission: ECC errors, power"
    assert missing_text(gpu()) == ""


def test_the_items_of_a_gpu_with_every_fact_and_of_one_with_none() -> None:
    items = dict(gpu_items(gpu(pcie_tx_bytes_per_s=2e9, pcie_rx_bytes_per_s=1e9, links=["X", "NV4", "SYS", "SYS"])))
    assert items["power"] == "650/700 W" and items["SM clock"] == "1980/1980 MHz" and items["SM"] == "n/a"
    assert items["PCIe"] == "out 1.86 GiB/s in 954 MiB/s" and items["peers"] == "NV4 to 1, SYS to 2"
    nothing = gpu_items(GpuStats(index=0, uuid="", name=""))
    assert nothing == [("util", "n/a"), ("SM", "n/a"), ("power", "n/a"), ("SM clock", "n/a")]


@pytest.mark.parametrize(
    ("joules", "text"), [(0.5, "0.50 J"), (512, "512 J"), (999.7, "1.00 kJ"), (4_530, "4.53 kJ"), (12.1e6, "12.1 MJ"),
                         (5e12, "5000 GJ"), (None, "n/a"), (float("nan"), "n/a")]
)  # fmt: skip
def test_energy_in_three_digits(joules: float | None, text: str) -> None:
    assert energy_text(joules) == text


def test_a_byte_rate() -> None:
    assert byte_rate_text(2e9) == "1.86 GiB/s" and byte_rate_text(None) == "n/a"


# ---- energy ---------------------------------------------------------------------------------------------------------
def powered(seconds: float, watts: tuple[float, ...] = (600.0, 400.0), base: float = 1e6) -> NodeStats:
    """Counters after `seconds` at constant power."""
    return node(*(gpu(i, energy_j=base + w * seconds) for i, w in enumerate(watts)), at_s=seconds)


def trained(steps: int, step_s: float = 2.0, probe_s: float = 1.0, ranks: int = 2) -> RunState:
    """Steps of `step_s` and samples every `probe_s`, on one clock."""
    state = RunState()
    for rank in range(ranks):
        state.apply(hello(rank, world_size=ranks, device=f"cuda:{rank}", device_uuid=f"GPU-{rank}"))
    sampled = 0.0
    for step in range(1, steps + 1):
        while sampled <= step * step_s:
            state.apply(powered(sampled))
            sampled += probe_s
        for rank in range(ranks):
            end_ns = int(step * step_s * SECOND)
            result = step_result(rank, step, step_ms=step_s * 1000, tokens_per_s=500.0, end_ns=end_ns)
            state.apply(result)
    state.apply(powered(sampled))
    return state


def test_energy_per_step_and_per_token_is_that_of_all_gpus() -> None:
    use = trained(20).energy_use()
    assert use is not None
    assert use.joules_per_step == pytest.approx(2000, rel=1e-6)  # 1000 W for 2 s
    assert use.power_w == pytest.approx(1000, rel=1e-6)
    # Two ranks, 500 tokens/s each: 2000 tokens per step.
    assert use.joules_per_million_tokens == pytest.approx(1e6, rel=1e-6)


@pytest.mark.parametrize(("step_s", "probe_s"), [(0.13, 1.0), (0.7, 1.1), (45.0, 1.0)])
def test_steps_shorter_and_longer_than_the_samples_cost_what_they_cost(step_s: float, probe_s: float) -> None:
    use = trained(int(200 / step_s), step_s, probe_s).energy_use()
    assert use is not None and use.joules_per_step == pytest.approx(1000 * step_s, rel=1e-3)


def test_there_is_no_energy_on_a_cpu_without_counters_or_before_two_steps() -> None:
    assert RunState().energy_use() is None
    assert trained(1).energy_use() is None
    state = trained(20)
    state.apply(hello(1))  # a rank on a CPU
    assert state.energy_use() is None
    bare = a_run(gpu(0))
    bare.apply(step_result(0, 1))
    bare.apply(step_result(0, 2))
    assert bare.energy_use() is None


def test_a_late_screen_and_a_frozen_view_see_the_same_energy() -> None:
    state = trained(60)
    late = RunState()
    messages = state.snapshot_messages()
    assert sum(isinstance(message, NodeStats) for message in messages) == 2
    late.apply_snapshot(Snapshot(hub_seq=1, now_ns=1, wall_s=1, messages=messages))
    expected, found, still = state.energy_use(), late.energy_use(), freeze(state)
    assert expected is not None and found is not None
    assert found.joules_per_step == pytest.approx(expected.joules_per_step, rel=1e-6)
    state.apply(powered(500.0, base=0.0))
    assert still.energy_use() == expected


def test_counters_that_start_again_do_not_make_energy() -> None:
    state = trained(20)
    state.apply(powered(42.0, base=0.0))  # the driver was loaded again
    assert state.energy_use() is None
    for step in range(21, 40):
        for rank in range(2):
            state.apply(step_result(rank, step, step_ms=2000, tokens_per_s=500.0, end_ns=int((step + 2) * 2 * SECOND)))
        state.apply(powered(2.0 * (step + 2) + 1, base=0.0))
    use = state.energy_use()
    assert use is not None and use.joules_per_step == pytest.approx(2000, rel=1e-6)


def test_on_several_nodes_the_energy_of_all_of_them_counts_without_comparing_clocks() -> None:
    state = RunState()
    for rank, host in enumerate(("box", "far")):
        state.apply(hello(rank, host=host, device="cuda:0", device_uuid=f"GPU-{rank}"))
    for second in range(80):
        state.apply(node(gpu(0, energy_j=600.0 * second), at_s=second))
        state.apply(node(gpu(1, energy_j=1e5 + 400.0 * second), at_s=9000 + second, host="far"))
        for rank, clock_s in enumerate((0, 9000)):
            end_ns = int((clock_s + second) * SECOND)
            state.apply(step_result(rank, second + 1, step_ms=1000, tokens_per_s=10.0, end_ns=end_ns))
    use = state.energy_use()
    assert use is not None and use.joules_per_step == pytest.approx(1000, rel=1e-6)
