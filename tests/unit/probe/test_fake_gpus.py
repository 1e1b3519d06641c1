"""The probe on NVML's C interface: a box of eight GPUs that throttle, break, refuse, hang and vanish on command."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from runtime.wire.codec import encode
from runtime.wire.node import GpuStats
from tests.harness.fake_nvml import NO_PERMISSION, NOT_SUPPORTED, FakeNvml
from tests.harness.waiting import patient, until
from zerotop.probe import nvml as nvml_module
from zerotop.probe import slow
from zerotop.probe.nvml import QUICK_FIELDS, GpuProbe, count_devices, list_devices, look_once, read
from zerotop.probe.slowfields import GROUPS

TRAFFIC = next(group.fields for group in GROUPS if group.name == "traffic")
SLOW_FIELDS = {field for group in GROUPS for field in group.fields}


@pytest.fixture
def probe_of(fake_nvml: FakeNvml) -> Iterator[Callable[..., GpuProbe]]:
    """Starts probes, and closes them at the end."""
    probes: list[GpuProbe] = []

    def start(interval_s: float = 0.02, nvml: Any = None) -> GpuProbe:
        probe = GpuProbe(interval_s, nvml=nvml or fake_nvml.binding())
        probes.append(probe)
        probe.start()
        return probe

    yield start
    for probe in probes:
        probe.close()


def seen(probe: GpuProbe, gpu: int, condition: Callable[[GpuStats], object]) -> GpuStats:
    """The GPU's sample, once `condition` holds for it."""

    def look() -> GpuStats | None:
        gpus, _ = probe.latest()
        return gpus[gpu] if gpus and len(gpus) > gpu and condition(gpus[gpu]) else None

    found = until(look, lambda: f"GPU {gpu}: {probe.latest()}")
    assert found is not None
    return found


def test_a_healthy_gpu_has_every_fact(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    gpu = seen(probe_of(), 7, lambda gpu: gpu.pcie_tx_bytes_per_s and gpu.links and gpu.nvlink_tx_bytes_per_s)
    assert (gpu.index, gpu.name, gpu.uuid) == (7, "NVIDIA H200", "GPU-00000000-0000-0000-0000-000000000007")
    assert (gpu.sm_activity_percent, gpu.tensor_activity_percent, gpu.dram_activity_percent) == (81, 42, 55)
    assert (gpu.power_w, gpu.power_limit_w, gpu.temperature_c, gpu.slowdown_temperature_c) == (650, 700, 61, 87)
    assert (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, gpu.memory_clock_mhz) == (1980, 1980, 3201)
    assert (gpu.pcie_generation, gpu.pcie_width, gpu.max_pcie_generation, gpu.max_pcie_width) == (5, 16, 5, 16)
    assert gpu.pcie_tx_bytes_per_s == pytest.approx(2e9, rel=0.05)
    assert gpu.pcie_rx_bytes_per_s == pytest.approx(1e9, rel=0.05)
    assert gpu.nvlink_tx_bytes_per_s == pytest.approx(4e10, rel=0.05)
    assert gpu.links == ["NV18"] * 7 + ["X"]
    assert (gpu.ecc_corrected, gpu.ecc_uncorrected, gpu.remapped_rows) == (0, 0, 0)
    assert not (gpu.clock_reasons or gpu.lost or gpu.mig or gpu.no_permission or gpu.stale_fields)


def test_the_energy_counter_advances_with_the_power(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    probe = probe_of()
    first = seen(probe, 0, lambda gpu: gpu.energy_j).energy_j
    assert first is not None
    assert seen(probe, 0, lambda gpu: gpu.energy_j > first + 1).power_w == 650


def test_a_gpu_throttled_by_its_power_cap_says_so_and_no_other(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    probe = probe_of()
    seen(probe, 3, lambda gpu: gpu.sm_clock_mhz == 1980)
    fake_nvml.set(3, reasons=0x4 | 0x40, sm_clock=1200, power=700)
    gpu = seen(probe, 3, lambda gpu: gpu.clock_reasons and gpu.max_sm_clock_mhz)
    assert gpu.clock_reasons == ["power cap", "hot (hardware)"]
    assert (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz, gpu.power_w, gpu.power_limit_w) == (1200, 1980, 700, 700)
    assert seen(probe, 2, lambda gpu: True).clock_reasons == []


def test_an_idle_gpu_is_not_called_throttled(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    fake_nvml.set("*", reasons=0x1, sm_clock=345)
    assert seen(probe_of(), 0, lambda gpu: gpu.sm_clock_mhz == 345).clock_reasons == []


def test_an_old_driver_without_event_reasons_is_asked_by_the_old_name(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    nvml = fake_nvml.binding()
    new = nvml.nvmlDeviceGetCurrentClocksEventReasons
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = new
    del nvml.nvmlDeviceGetCurrentClocksEventReasons
    fake_nvml.set("*", reasons=0x4)
    assert seen(probe_of(nvml=nvml), 0, lambda gpu: gpu.clock_reasons).clock_reasons == ["power cap"]


def test_an_xid_is_heard_and_the_gpu_that_is_lost_keeps_its_name(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    probe = probe_of()
    before = seen(probe, 5, lambda gpu: gpu.power_w)
    fake_nvml.xid(5, 79)
    heard = until(probe.take_xids, "the XID")
    assert [(xid.gpu, xid.number, xid.uuid) for xid in heard] == [(5, 79, before.uuid)]
    fake_nvml.set(5, lost=1)
    lost = seen(probe, 5, lambda gpu: gpu.lost)
    assert (lost.uuid, lost.name) == (before.uuid, before.name)
    assert lost.power_w is lost.used_bytes is lost.sm_activity_percent is None
    assert not seen(probe, 4, lambda gpu: gpu.power_w).lost
    fake_nvml.set(5, lost=0)
    seen(probe, 5, lambda gpu: gpu.power_w)


def test_a_fatal_xid_stays_with_its_gpu_and_an_error_of_the_program_does_not(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    probe = probe_of()
    seen(probe, 3, lambda gpu: gpu.power_w)
    for number in (13, 119, 45):
        fake_nvml.xid(3, number)
    gpu = seen(probe, 3, lambda gpu: gpu.xid)
    until(lambda: any(xid.number == 45 for xid in probe.take_xids()), "the last XID")
    assert seen(probe, 3, lambda gpu: gpu.xid) is not None and not seen(probe, 4, lambda gpu: gpu.power_w).xid
    assert gpu.xid == 119 and gpu.xid_text.startswith("XID 119: the GPU's system processor (GSP) does not answer")
    assert "; reset the GPU, or reboot" in gpu.xid_text and time.time() - gpu.xid_wall_s < patient(60)
    assert probe.latest()[0][3].xid == 119  # type: ignore[index]


def test_what_needs_a_permission_is_named_and_the_rest_is_there(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    for function in ("nvmlGpmQueryDeviceSupport", "nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetPowerUsage"):
        fake_nvml.fail("*", function, NO_PERMISSION)
    gpu = seen(probe_of(), 0, lambda gpu: gpu.remapped_rows == 0 and gpu.pcie_tx_bytes_per_s)
    assert set(gpu.no_permission) == {
        "dram_activity_percent", "ecc_corrected", "ecc_uncorrected", "power_w", "sm_activity_percent",
        "tensor_activity_percent",
    }  # fmt: skip
    assert gpu.power_w is gpu.sm_activity_percent is gpu.ecc_corrected is None
    assert gpu.remapped_rows == 0 and gpu.utilization_percent == 97


def test_a_gpu_that_the_container_may_not_open_stays_in_the_list(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    fake_nvml.fail(1, "nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION)
    fake_nvml.set(3, nvlinks=0)
    probe = probe_of()
    assert seen(probe, 3, lambda gpu: gpu.links).links == ["NODE", "", "NODE", "X", *["SYS"] * 4]
    assert seen(probe, 1, lambda gpu: True).name == "no permission to access this GPU"
    assert seen(probe, 2, lambda gpu: gpu.power_w).name == "NVIDIA H200"
    assert seen(probe, 0, lambda gpu: gpu.links).links == ["X", "", *["NV18"] * 6]


def test_a_partitioned_gpu_has_no_utilization_and_no_activity(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    fake_nvml.set(0, mig=1)
    gpu = seen(probe_of(), 0, lambda gpu: gpu.mig)
    assert gpu.utilization_percent is gpu.sm_activity_percent is gpu.tensor_activity_percent is None
    assert gpu.total_bytes == 150_000_000_000 and gpu.power_w == 650
    assert not gpu.no_permission and not gpu.stale_fields


@pytest.mark.parametrize("old", [False, True])
def test_what_the_driver_keeps_is_not_used_by_anybody(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe], old: bool
) -> None:
    fake_nvml.set(0, used=2_000_000_000, reserved=600_000_000, old_memory_info=int(old))
    gpu = seen(probe_of(), 0, lambda gpu: gpu.total_bytes)
    assert (gpu.used_bytes, gpu.driver_bytes) == ((2_000_000_000, None) if old else (1_400_000_000, 600_000_000))
    assert not gpu.no_permission


def test_unified_memory_has_no_memory_of_its_own(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    fake_nvml.set("*", unified=1, gpm=0, nvlinks=0)
    for function in ("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetRemappedRows", "nvmlDeviceGetEnforcedPowerLimit",
                     "nvmlDeviceGetFieldValues", "nvmlDeviceGetCurrPcieLinkWidth"):  # fmt: skip
        fake_nvml.fail("*", function, NOT_SUPPORTED)
    gpu = seen(probe_of(), 0, lambda gpu: gpu.links and gpu.max_pcie_width and gpu.max_sm_clock_mhz)
    assert gpu.used_bytes is gpu.total_bytes is gpu.power_limit_w is gpu.ecc_corrected is gpu.remapped_rows is None
    assert gpu.pcie_tx_bytes_per_s is gpu.nvlink_tx_bytes_per_s is gpu.pcie_width is None
    assert gpu.links == ["X", *["NODE"] * 3, *["SYS"] * 4]
    assert gpu.utilization_percent == 97 and not gpu.no_permission


def test_figures_that_the_driver_marks_as_not_available_are_missing(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    fake_nvml.set(0, util=2**32 - 1, temperature=2**32 - 1, sm_clock=2**32 - 1, pcie_gen=2**32 - 1)
    fake_nvml.set(0, used=1.8e19, ecc_corrected=1.8e19)  # what -1 looks like to a reader of 64 bits
    gpu = seen(probe_of(), 0, lambda gpu: gpu.pcie_width and gpu.remapped_rows == 0)
    assert gpu.used_bytes is gpu.ecc_corrected is None and gpu.total_bytes == 150_000_000_000
    assert gpu.utilization_percent is gpu.temperature_c is gpu.sm_clock_mhz is gpu.pcie_generation is None


def test_bridged_pairs_are_told_from_gpus_that_only_share_the_bus(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    fake_nvml.set("*", nvswitch=0, nvlinks=4)
    gpu = seen(probe_of(), 1, lambda gpu: gpu.links)
    assert gpu.links == ["NV4", "X", "NODE", "NODE", "SYS", "SYS", "SYS", "SYS"]


def test_where_the_counters_are_too_narrow_gpm_tells_the_pcie_rate(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]
) -> None:
    fake_nvml.set("*", pcie_bits=32)
    fake_nvml.set(1, gpm=0)
    probe = probe_of()
    assert seen(probe, 0, lambda gpu: gpu.pcie_tx_bytes_per_s).pcie_tx_bytes_per_s == pytest.approx(2e9, rel=1e-3)
    without = seen(probe, 1, lambda gpu: gpu.nvlink_tx_bytes_per_s)
    assert without.pcie_tx_bytes_per_s is without.sm_activity_percent is None


def test_a_counter_that_starts_again_gives_no_wild_rate(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    fake_nvml.set("*", gpm=0)
    probe = probe_of()
    seen(probe, 0, lambda gpu: gpu.pcie_tx_bytes_per_s)
    fake_nvml.set(0, pcie_tx=0, nvlink_tx=0)  # far below what was counted
    seen(probe, 0, lambda gpu: gpu.pcie_tx_bytes_per_s is None and gpu.nvlink_tx_bytes_per_s is None)
    again = seen(probe, 0, lambda gpu: gpu.pcie_tx_bytes_per_s is not None)
    assert 0 <= (again.pcie_tx_bytes_per_s or 0) <= 2.2e9


def test_what_is_not_supported_is_asked_once(fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe]) -> None:
    nvml, calls = fake_nvml.binding(), Counter[str]()
    names = ("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlGpmQueryDeviceSupport")

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return function(*arguments)

        return call

    for name in names:
        setattr(nvml, name, counted(name, getattr(nvml, name)))
    fake_nvml.gpus(1)
    fake_nvml.fail(0, "nvmlDeviceGetUtilizationRates", NOT_SUPPORTED)
    fake_nvml.fail(0, "nvmlGpmQueryDeviceSupport", NOT_SUPPORTED)
    probe_of(nvml=nvml)
    until(lambda: calls["nvmlDeviceGetPowerUsage"] >= 20)
    assert calls["nvmlDeviceGetUtilizationRates"] == calls["nvmlGpmQueryDeviceSupport"] == 1


def test_a_slow_call_that_hangs_costs_the_slow_fields_of_its_gpu_and_not_the_tick(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "STALE_S", 0.2)
    probe = probe_of(0.05)
    for gpu in (0, 4):
        seen(probe, gpu, lambda gpu: gpu.sm_activity_percent and gpu.remapped_rows == 0)
    hang_s = patient(4)
    fake_nvml.hang(4, "nvmlDeviceGetFieldValues", hang_s)
    ticks, energy, end = list[float](), 0.0, time.monotonic() + 0.7 * hang_s
    while time.monotonic() < end:
        gpus, _ = probe.latest()
        now = (gpus[4].energy_j or 0.0) if gpus else 0.0
        if now != energy:
            energy = now
            ticks.append(time.monotonic())
        time.sleep(0.002)
    gaps = [after - before for before, after in pairwise(ticks)]
    assert len(gaps) >= 10 and max(gaps) < hang_s / 4, gaps
    stale = seen(probe, 4, lambda gpu: gpu.stale_fields)
    assert set(TRAFFIC) <= set(stale.stale_fields) and stale.stale_s is not None and stale.stale_s > 1
    assert stale.sm_activity_percent is None and stale.utilization_percent == 97 and stale.power_w == 650
    assert stale.remapped_rows == 0  # read before, and not old yet
    seen(probe, 0, lambda gpu: gpu.sm_activity_percent and not gpu.stale_fields)
    fake_nvml.reset()
    seen(probe, 4, lambda gpu: gpu.sm_activity_percent and not gpu.stale_fields)


def test_a_slow_call_that_never_came_back_is_named_too(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "STALE_S", 0.2)
    fake_nvml.hang(0, "nvmlGpmQueryDeviceSupport", patient(2))
    gpu = seen(probe_of(), 0, lambda gpu: gpu.stale_fields)
    assert set(gpu.stale_fields) == SLOW_FIELDS and gpu.power_w == 650


def test_a_gpu_that_does_not_answer_at_all_is_named_and_the_others_go_on(
    fake_nvml: FakeNvml, probe_of: Callable[..., GpuProbe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvml_module, "STALE_S", 0.3)
    fake_nvml.gpus(3)
    probe = probe_of()
    known = seen(probe, 1, lambda gpu: gpu.power_w and gpu.max_sm_clock_mhz)
    fake_nvml.hang(1, "nvmlDeviceGetPowerUsage", patient(4))
    silent = seen(probe, 1, lambda gpu: gpu.stale_fields)
    assert set(QUICK_FIELDS) <= set(silent.stale_fields) and silent.power_w is silent.utilization_percent is None
    assert (silent.uuid, silent.name, silent.max_sm_clock_mhz) == (known.uuid, known.name, 1980)
    before = seen(probe, 2, lambda gpu: gpu.energy_j).energy_j or 0.0
    seen(probe, 2, lambda gpu: (gpu.energy_j or 0.0) > before)
    assert probe.latest()[1] == ""
    fake_nvml.reset()
    seen(probe, 1, lambda gpu: gpu.power_w and not gpu.stale_fields)


def test_closing_does_not_wait_for_a_call_that_hangs(fake_nvml: FakeNvml) -> None:
    fake_nvml.hang("*", "nvmlDeviceGetFieldValues", patient(4))
    fake_nvml.hang(0, "nvmlDeviceGetPowerUsage", patient(4))
    probe = GpuProbe(0.02, nvml=fake_nvml.binding())
    probe.start()
    until(lambda: any(thread.name == "nvml" for thread in threading.enumerate()))
    before = time.monotonic()
    probe.close()
    assert time.monotonic() - before < patient(3)


def test_a_box_without_a_driver_and_one_without_gpus(fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus(0)
    assert look_once(fake_nvml.binding())[0] == [] and count_devices(fake_nvml.binding()) == (0, "")
    fake_nvml.no_driver()
    assert look_once(fake_nvml.binding()) == ([], "", "no NVIDIA driver")
    assert count_devices(fake_nvml.binding()) == (0, "no NVIDIA driver")


def test_one_look_finds_every_fact_and_a_lost_gpu(fake_nvml: FakeNvml) -> None:
    fake_nvml.set(6, lost=1)
    gpus, version, note = look_once(fake_nvml.binding())
    assert (version, note, len(gpus)) == ("570.00 (fake)", "", 8)
    assert gpus[0].sm_activity_percent == 81 and gpus[0].links[1] == "NV18"
    assert gpus[0].pcie_tx_bytes_per_s == pytest.approx(2e9, rel=0.05)
    assert gpus[6].lost and not gpus[5].lost
    missing = SLOW_FIELDS - gpus[0].model_fields_set
    assert missing == {"mig", "row_remap_pending", "row_remap_failed"}  # False, which is the default


def test_a_sample_of_eight_gpus_is_small_on_the_wire(fake_nvml: FakeNvml) -> None:
    gpus, _, _ = look_once(fake_nvml.binding())
    assert sum(len(encode(gpu)) for gpu in gpus) < 8 * 1024


def test_a_tick_of_eight_gpus_costs_little(fake_nvml: FakeNvml) -> None:
    nvml = fake_nvml.binding()
    nvml.nvmlInit()
    devices = list_devices(nvml, [])
    times = []
    for _ in range(21):
        begin = time.thread_time()
        samples = [read(device) for device in devices]
        times.append(time.thread_time() - begin)
    nvml.nvmlShutdown()
    assert len(samples) == 8 and all(sample.power_w == 650 for sample in samples)
    assert statistics.median(times) < 0.02  # 1.0 ms in benchmarks/results/gpu-probe.md
