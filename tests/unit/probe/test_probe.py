"""The probe on machines with and without GPUs, and with drivers that refuse, know little, or hang."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from runtime.wire.node import GpuStats
from tests.harness.waiting import patient, until
from zerotop.probe import host, nvml
from zerotop.probe.host import HostProbe
from zerotop.probe.nvml import GpuProbe, count_devices, list_devices, no_gpu_note, read
from zerotop.probe.xid import Xid, XidWatch, _key


class NvmlError(Exception):
    pass


class NotFound(NvmlError):
    pass


class NotLoaded(NvmlError):
    pass


def driver(**functions: object) -> SimpleNamespace:
    """NVML's Python binding with these functions; any other is missing."""
    errors = {"NVMLError": NvmlError, "NVMLError_LibraryNotFound": NotFound, "NVMLError_DriverNotLoaded": NotLoaded}
    basics = {"nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1}
    return SimpleNamespace(**errors, **(basics | functions))


def sample(nvml_: SimpleNamespace) -> list[GpuStats]:
    return [read(device) for device in list_devices(nvml_, [])]


def refuse(*_: object) -> None:
    raise NvmlError("Not Supported")


FULL = {
    "nvmlDeviceGetCount": lambda: 2,
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetUUID": lambda handle: b"GPU-%d" % handle,
    "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
    "nvmlDeviceGetMemoryInfo": lambda handle, version=None: SimpleNamespace(used=3, total=10),
    "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=97),
    "nvmlDeviceGetPowerUsage": lambda handle: 650_500,
    "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700_000,
    "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
    "nvmlDeviceGetClockInfo": lambda handle, clock: 1980,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0b101,
    "nvmlClocksEventReasonSwPowerCap": 4,
    "nvmlClocksEventReasonSyncBoost": 2,
}


def test_every_field_of_a_full_driver() -> None:
    found = sample(driver(**FULL))
    assert [gpu.uuid for gpu in found] == ["GPU-0", "GPU-1"]
    assert found[1].model_dump(exclude_unset=True) == {
        "index": 1, "uuid": "GPU-1", "name": "NVIDIA H200", "used_bytes": 3, "total_bytes": 10,
        "utilization_percent": 97.0, "power_w": 650.5, "power_limit_w": 700.0, "temperature_c": 61.0,
        "sm_clock_mhz": 1980.0, "memory_clock_mhz": 1980.0, "clock_reasons": ["power cap"],
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FULL if name.startswith("nvmlDevice") and "Count" not in name])
def test_what_a_device_does_not_support_is_missing_and_nothing_else(name: str) -> None:
    found = sample(driver(**(FULL | {name: refuse})))
    assert len(found) == 2
    if "Handle" in name:
        assert "lost" in found[0].name and found[0].used_bytes is None
    else:
        assert (found[0].power_w is None) == ("PowerUsage" in name)
        assert (found[0].used_bytes is None) == ("MemoryInfo" in name)
    missing = {key: value for key, value in FULL.items() if key != name}
    assert len(sample(driver(**missing))) == 2  # an older binding does not have the function at all


def test_without_a_driver_the_note_says_so() -> None:
    def fail() -> None:
        raise NotFound

    probe = GpuProbe(nvml=driver(nvmlInit=fail))
    probe.start()
    until(lambda: probe.latest() == (None, "no NVIDIA driver"))
    probe.close()
    assert count_devices(driver(nvmlInit=fail)) == (0, "no NVIDIA driver")
    assert no_gpu_note(NvmlError("Insufficient Permissions"), driver()) == "NVML: Insufficient Permissions"


def test_samples_go_on_after_a_refusal() -> None:
    answers = iter([refuse, *[lambda: 2] * 10_000])
    probe = GpuProbe(interval_s=0.01, nvml=driver(**(FULL | {"nvmlDeviceGetCount": lambda: next(answers)()})))
    probe.start()
    until(lambda: probe.latest()[0] is not None)
    gpus, note = probe.latest()
    assert gpus is not None and len(gpus) == 2 and note == ""
    probe.close()
    assert not any(thread.is_alive() for thread in probe._threads)


def test_a_wedged_driver_blocks_nobody_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "STALE_S", 0.05)
    free = threading.Event()

    def hang() -> int:
        free.wait(patient(10))
        return 0

    stuck = driver(nvmlDeviceGetCount=hang)
    probe = GpuProbe(nvml=stuck)
    probe.start()
    until(lambda: "has not answered" in probe.latest()[1])
    before = time.monotonic()
    assert probe.latest()[0] is None
    assert count_devices(stuck)[0] == 0
    assert time.monotonic() - before < patient(2)
    free.set()
    probe.close()


def test_this_machine_is_sampled() -> None:
    probe = HostProbe()
    me = os.getpid()
    gone = max(psutil.pids()) + 100_000
    stats = probe.sample({0: me, 7: gone}, None, "no NVIDIA driver")
    assert stats.gpus is None and stats.gpu_note == "no NVIDIA driver"
    assert set(stats.rank_rss_bytes) == set(stats.rank_cpu_percent) == {0}
    assert stats.run_rss_bytes >= stats.rank_rss_bytes[0] > 10 * 2**20
    assert 0 < stats.ram_used_bytes <= stats.ram_total_bytes and stats.cpu_count >= 1
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert probe.sample({0: me}, None, "").rank_cpu_percent[0] > 5


def test_a_container_s_limit_counts_where_it_is_lower(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    group = tmp_path / "job"
    group.mkdir()
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    (tmp_path / "self").write_text("0::/job\n")
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(host, "_OWN_CGROUP", tmp_path / "self")
    assert host._container_memory(5000, 8000) == (500, 1000)
    assert host._container_memory(500, 900) == (500, 900)
    (group / "memory.max").write_text("max\n")
    assert host._container_memory(5000, 8000) == (5000, 8000)


# ---- XIDs ------------------------------------------------------------------------------------------------------------
class NvmlTimeout(NvmlError):
    pass


class NvmlLost(NvmlError):
    pass


def with_events(*heard: object, **changes: object) -> tuple[SimpleNamespace, list[str]]:
    """A driver of two GPUs that reports these (handle, number), or raises them; and what was freed."""
    waiting, freed = list(heard), list[str]()

    def wait(events: object, timeout_ms: int) -> SimpleNamespace:
        if not waiting:
            time.sleep(0.001)
            raise NvmlTimeout
        found = waiting.pop(0)
        if isinstance(found, Exception):
            raise found
        handle, number = found  # type: ignore[misc]
        return SimpleNamespace(device=handle, eventType=8, eventData=number)

    functions = FULL | {
        "NVMLError_Timeout": NvmlTimeout,
        "NVMLError_GpuIsLost": NvmlLost,
        "nvmlEventTypeXidCriticalError": 8,
        "nvmlEventSetCreate": lambda: "events",
        "nvmlEventSetFree": lambda events: freed.append(events),
        "nvmlDeviceRegisterEvents": lambda handle, kinds, events: None,
        "nvmlEventSetWait_v2": wait,
    }
    return driver(**(functions | changes)), freed


def test_xids_are_heard_and_told_in_plain_words() -> None:
    nvml_, freed = with_events((1, 79), NvmlLost(), (0, 31), (9, 999))
    probe = GpuProbe(interval_s=0.01, nvml=nvml_)
    probe.start()
    heard: list[Xid] = []

    def all_of_them() -> bool:
        heard.extend(probe.take_xids())
        return len(heard) >= 3

    until(all_of_them)
    assert [(xid.gpu, xid.uuid, xid.number) for xid in heard] == [(1, "GPU-1", 79), (0, "GPU-0", 31), (None, "", 999)]
    assert heard[0].text.startswith("GPU 1: XID 79: the GPU has fallen off the bus; reboot")
    assert heard[2].text.startswith("a GPU: XID 999; see NVIDIA's list")
    probe.close()
    until(lambda: freed == ["events"])
    assert probe.take_xids() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"nvmlEventSetCreate": refuse},
        {"nvmlDeviceRegisterEvents": refuse},
        {"nvmlEventSetWait_v2": refuse},
        {"nvmlInit": refuse},
    ],
)
def test_where_nvml_knows_no_events_nothing_is_heard_and_nothing_fails(changes: dict[str, object]) -> None:
    nvml_, _ = with_events(**changes)
    watch = XidWatch(nvml_)
    watch.start()
    until(lambda: not watch._thread.is_alive())
    assert watch.take() == []


def test_an_old_binding_without_events_is_no_problem() -> None:
    watch = XidWatch(driver(**FULL))
    watch.start()
    until(lambda: not watch._thread.is_alive())
    assert watch.take() == []


def test_the_binding_has_what_the_watch_asks_for() -> None:
    handle = pynvml.c_nvmlDevice_t()
    assert _key(handle) == _key(pynvml.c_nvmlDevice_t()) and isinstance(pynvml.c_nvmlEventData_t().device, type(handle))
    names = "nvmlEventSetCreate nvmlEventSetFree nvmlEventSetWait_v2 nvmlDeviceRegisterEvents NVMLError_GpuIsLost"
    assert all(hasattr(pynvml, name) for name in names.split())
    assert pynvml.nvmlEventTypeXidCriticalError == 8 and pynvml.NVMLError_Timeout
