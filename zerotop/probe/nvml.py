"""GPUs as the driver reports them. Every field may be missing: MIG, unified memory, containers and old drivers answer
NotSupported or NoPermission.

Each GPU has a thread for what is quick to read, once per tick, and one of `SlowReader` for the rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pynvml

from runtime.wire.node import GpuStats
from zerotop.format import duration_text
from zerotop.probe.device import LOST, Device, percent
from zerotop.probe.slow import SlowReader, SlowValues
from zerotop.probe.slowfields import GROUPS, Reader
from zerotop.probe.xid import Xid, XidWatch

STALE_S = 5.0
"""A driver that takes longer to answer is reported as not responding."""
CLOSE_S = 0.5
_UNKNOWN = "GPU of unknown model"
QUICK_FIELDS = (
    "utilization_percent",
    "used_bytes",
    "power_w",
    "energy_j",
    "temperature_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "clock_reasons",
)
_SETTLE_S = 0.2
"""Between the two readings of `look_once`: GPM wants 100 ms."""
_CLOCK_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "hot (software)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hot (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
    "nvmlClocksEventReasonApplicationsClocksSetting": "application clocks",
}


class GpuProbe:
    """Samples each GPU in a daemon thread of its own, so that a wedged driver blocks nobody, and a wedged GPU no other;
    `latest` never waits."""

    def __init__(self, interval_s: float = 1.0, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._devices: list[Device] | None = None
        self._samples: dict[Device, tuple[float, GpuStats | None]] = {}
        """When each device answered last (before that: when it was found), and its sample."""
        self._note = "waiting for the driver"
        self._asked_at = time.monotonic()
        self._answered = False
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="nvml", daemon=True)]
        self._slow = SlowReader(nvml)
        self._xids = XidWatch(nvml)

    def start(self) -> None:
        """Start sampling."""
        self._threads[0].start()
        self._xids.start()

    def close(self) -> None:
        """End the threads; those that are stuck in the driver are left behind."""
        self._closing.set()
        self._slow.close()
        end = time.monotonic() + CLOSE_S
        for thread in list(self._threads):
            if thread.is_alive():
                thread.join(timeout=max(0.0, end - time.monotonic()))
        self._xids.close()

    def take_xids(self) -> list[Xid]:
        """XID errors that the driver has reported since the last call."""
        return self._xids.take()

    def latest(self) -> tuple[list[GpuStats] | None, str]:
        """The newest sample, or None and the reason."""
        now = time.monotonic()
        with self._lock:
            if not self._answered and now - self._asked_at > STALE_S:
                return None, f"the NVIDIA driver has not answered for {duration_text(now - self._asked_at)}"
            if self._devices is None:
                return None, self._note
            seen = [(device, *self._samples[device]) for device in self._devices]
        if any(sample is None and now - answered_s <= STALE_S for _, answered_s, sample in seen):
            return None, "waiting for the driver"
        samples = [self._current(device, answered_s, sample, now) for device, answered_s, sample in seen]
        return [self._with_fault(sample) for sample in samples], ""

    def _with_fault(self, sample: GpuStats) -> GpuStats:
        xid = self._xids.faults.get(sample.uuid)
        if xid is None:
            return sample
        return sample.model_copy(update={"xid": xid.number, "xid_text": xid.fault, "xid_wall_s": xid.wall_s})

    def _current(self, device: Device, answered_s: float, sample: GpuStats | None, now: float) -> GpuStats:
        if sample is not None and now - answered_s <= self._interval_s + STALE_S:
            return sample
        slow = self._slow.values(device)
        stale = SlowValues(slow.values, (*QUICK_FIELDS, *slow.stale), max(now - answered_s, slow.stale_s))
        return _stats(device, {}, stale)

    def _run(self) -> None:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._put(None, no_gpu_note(error, self._nvml))
            return
        devices: list[Device] = []
        while not self._closing.is_set():
            with self._lock:
                self._asked_at, self._answered = time.monotonic(), False
            try:
                devices = list_devices(self._nvml, devices)
            except self._nvml.NVMLError as error:
                self._put(None, f"NVML: {error}")
            else:
                self._put(devices, "")
                self._slow.take_devices(devices)
            self._closing.wait(self._interval_s)
        self._nvml.nvmlShutdown()

    def _put(self, devices: list[Device] | None, note: str) -> None:
        with self._lock:
            self._devices, self._note, self._answered = devices, note, True
            fresh = [device for device in devices or () if device not in self._samples]
            self._samples |= dict.fromkeys(fresh, (time.monotonic(), None))
        for device in fresh:
            thread = threading.Thread(target=self._sample, args=(device,), name=f"nvml-{device.index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _sample(self, device: Device) -> None:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return  # the driver went away since it was asked how many GPUs it has
        while not self._closing.is_set():
            sample = read(device, self._slow)
            with self._lock:
                self._samples[device] = (time.monotonic(), sample)
            self._closing.wait(self._interval_s)
        self._nvml.nvmlShutdown()


def no_gpu_note(error: Exception, nvml: Any = pynvml) -> str:
    """Why NVML cannot be used."""
    if isinstance(error, nvml.NVMLError_LibraryNotFound | nvml.NVMLError_DriverNotLoaded):
        return "no NVIDIA driver"
    return f"NVML: {error}"


def list_devices(nvml: Any, known: list[Device]) -> list[Device]:
    """The GPUs of the node, those of `known` again. Needs nvmlInit. Raises NVMLError if they cannot be counted."""
    count = nvml.nvmlDeviceGetCount()
    return known[:count] + [Device(nvml, index) for index in range(len(known), count)]


def read(device: Device, slow: SlowReader | None = None) -> GpuStats:
    """A sample of one device: the quick fields now, the slow ones as they were read last."""
    if not device.open():
        # Its name and UUID are known from before: the rank's line stays, and says what has happened.
        name = device.name or ("no permission to access this GPU" if "uuid" in device.denied else LOST)
        return GpuStats(index=device.index, uuid=device.uuid, name=name, lost=device.lost)
    values = _quick(device)
    if device.lost:
        return GpuStats(index=device.index, uuid=device.uuid, name=device.name, lost=True)
    return _stats(device, values, slow.values(device) if slow is not None else SlowValues({}))


def _stats(device: Device, quick: dict[str, Any], slow: SlowValues) -> GpuStats:
    known = (quick | slow.values).items()
    values = {field: value for field, value in known if value is not None and value is not False}
    if denied := sorted(device.denied - values.keys()):
        values["no_permission"] = denied
    if slow.stale:
        values |= {"stale_fields": list(slow.stale), "stale_s": round(slow.stale_s, 1)}
    # Only what is known is set, because unset fields take no room on the wire and in the recording.
    return GpuStats(index=device.index, uuid=device.uuid, name=device.name or _UNKNOWN, **values)


def _memory(device: Device) -> Any:
    """The memory of a device. The newer structure leaves out of `used` what the driver keeps for itself, some 600 MiB
    on an H200, which CUDA does not count either; the older one, which is all that drivers before 510 have, does not."""
    found = None
    if (version := getattr(device.nvml, "nvmlMemory_v2", None)) is not None:
        found = device.ask("driver_bytes", "nvmlDeviceGetMemoryInfo", device.handle, version)
    return device.ask("used_bytes", "nvmlDeviceGetMemoryInfo", device.handle) if found is None else found


def _quick(device: Device) -> dict[str, Any]:
    nvml, handle = device.nvml, device.handle
    memory = _memory(device)
    rates = device.ask("utilization_percent", "nvmlDeviceGetUtilizationRates", handle)
    reasons = device.ask("clock_reasons", "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # the name before driver 535
        reasons = device.ask("clock_reasons", "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    has_memory = memory is not None and 0 < memory.total < 2**63
    return {
        "used_bytes": memory.used if has_memory and memory.used <= memory.total else None,
        "total_bytes": memory.total if has_memory else None,
        "driver_bytes": getattr(memory, "reserved", None) if has_memory else None,
        "utilization_percent": percent(rates.gpu) if rates is not None else None,
        "power_w": device.number("power_w", "nvmlDeviceGetPowerUsage", handle, scale=1 / 1000),
        "power_limit_w": device.number("power_limit_w", "nvmlDeviceGetEnforcedPowerLimit", handle, scale=1 / 1000),
        "energy_j": device.number("energy_j", "nvmlDeviceGetTotalEnergyConsumption", handle, scale=1 / 1000),
        "temperature_c": device.number("temperature_c", "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": device.number("sm_clock_mhz", "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": device.number("memory_clock_mhz", "nvmlDeviceGetClockInfo", handle, 2),
        "clock_reasons": _clock_reasons(nvml, reasons),
    }


def _clock_reasons(nvml: Any, mask: int | None) -> list[str] | None:
    named = [words for name, words in _CLOCK_REASONS.items() if mask and mask & getattr(nvml, name, 0)]
    return named or None


def count_devices(nvml: Any = pynvml) -> tuple[int, str]:
    """How many GPUs the driver has, and the reason if there are none. For the command line; may take as long as the
    driver does."""
    counted: list[tuple[int, str]] = []

    def count() -> None:
        try:
            nvml.nvmlInit()
            counted.append((nvml.nvmlDeviceGetCount(), ""))
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            counted.append((0, no_gpu_note(error, nvml)))

    _bounded(count, STALE_S)
    return counted[0] if counted else (0, f"the NVIDIA driver has not answered for {duration_text(STALE_S)}")


def look_once(nvml: Any = pynvml) -> tuple[list[GpuStats], str, str]:
    """One sample of every GPU with all fields, the driver's version, and the reason if there are no GPUs. For the
    command line; bounded, where the driver hangs."""
    found: list[tuple[list[GpuStats], str, str]] = []

    def look() -> None:
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            found.append(([], "", no_gpu_note(error, nvml)))
            return
        try:
            version = nvml.nvmlSystemGetDriverVersion()
            gpus = _look(list_devices(nvml, []))
            found.append((gpus, version.decode() if isinstance(version, bytes) else version, ""))
        except nvml.NVMLError as error:
            found.append(([], "", f"the driver answers with an error: {error}"))
        finally:
            nvml.nvmlShutdown()

    _bounded(look, STALE_S)
    return found[0] if found else ([], "", f"the NVIDIA driver has not answered for {duration_text(STALE_S)}")


def _look(devices: list[Device]) -> list[GpuStats]:
    present = [device for device in devices if device.open()]
    readers = {device: Reader(device) for device in present}
    slow: dict[Device, dict[str, Any]] = {device: {} for device in present}
    for device, reader in readers.items():
        for group in GROUPS[::-1]:
            slow[device] |= group.read(reader, devices)
    if present:
        time.sleep(_SETTLE_S)
    for device, reader in readers.items():
        slow[device] |= reader.traffic()
        reader.close()
    return [
        _stats(device, _quick(device), SlowValues(slow[device])) if device in slow and not device.lost else read(device)
        for device in devices
    ]


def _bounded(function: Callable[[], None], timeout_s: float) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout_s)
