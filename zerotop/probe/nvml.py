"""GPUs as the driver reports them. Every field may be missing: MIG, unified memory and old drivers answer
NotSupported."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pynvml

from runtime.wire.messages import GpuStats
from zerotop.format import duration_text
from zerotop.probe.xid import Xid, XidWatch

STALE_S = 5.0
"""A driver that takes longer to answer is reported as not responding."""
_CLOCK_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "hot (software)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hot (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "nvmlClocksEventReasonSyncBoost": "sync boost",
}


class GpuProbe:
    """Samples in a daemon thread of its own, so that a wedged driver blocks nobody; `latest` never waits."""

    def __init__(self, interval_s: float = 1.0, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._gpus: list[GpuStats] | None = None
        self._note = "waiting for the driver"
        self._asked_at = time.monotonic()
        self._answered = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._xids = XidWatch(nvml)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()
        self._xids.start()

    def close(self) -> None:
        """End the thread; one that is stuck in the driver is left behind."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=0.5)
        self._xids.close()

    def take_xids(self) -> list[Xid]:
        """XID errors that the driver has reported since the last call."""
        return self._xids.take()

    def latest(self) -> tuple[list[GpuStats] | None, str]:
        """The newest sample, or None and the reason."""
        with self._lock:
            silent_s = time.monotonic() - self._asked_at
            if not self._answered and silent_s > STALE_S:
                return None, f"the NVIDIA driver has not answered for {duration_text(silent_s)}"
            return self._gpus, self._note

    def _run(self) -> None:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            self._put(None, no_gpu_note(error, self._nvml))
            return
        while not self._closing.is_set():
            with self._lock:
                self._asked_at, self._answered = time.monotonic(), False
            try:
                gpus = sample(self._nvml)
            except self._nvml.NVMLError as error:
                self._put(None, f"NVML: {error}")
            else:
                self._put(gpus, "")
            self._closing.wait(self._interval_s)
        self._nvml.nvmlShutdown()

    def _put(self, gpus: list[GpuStats] | None, note: str) -> None:
        with self._lock:
            self._gpus, self._note, self._answered = gpus, note, True


def no_gpu_note(error: Exception, nvml: Any = pynvml) -> str:
    """Why NVML cannot be used."""
    if isinstance(error, nvml.NVMLError_LibraryNotFound | nvml.NVMLError_DriverNotLoaded):
        return "no NVIDIA driver"
    return f"NVML: {error}"


def sample(nvml: Any = pynvml) -> list[GpuStats]:
    """One GpuStats per device; needs nvmlInit. Raises NVMLError only if the devices cannot be counted."""
    return [_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def _device(nvml: Any, index: int) -> GpuStats:
    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except (
            nvml.NVMLError,
            AttributeError,
        ):  # not supported by this device, or not known to this version of the binding
            return None

    handle = ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return GpuStats(index=index, uuid="", name="GPU is lost or not accessible")
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    rates = ask("nvmlDeviceGetUtilizationRates", handle)
    return GpuStats(
        index=index,
        uuid=_text(ask("nvmlDeviceGetUUID", handle)),
        name=_text(ask("nvmlDeviceGetName", handle)),
        used_bytes=memory.used if memory else None,
        total_bytes=memory.total if memory else None,
        utilization_percent=rates.gpu if rates else None,
        power_w=_scaled(ask("nvmlDeviceGetPowerUsage", handle), 1 / 1000),
        power_limit_w=_scaled(ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1 / 1000),
        temperature_c=_scaled(ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU), 1),
        sm_clock_mhz=_scaled(ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM), 1),
        clock_reasons=_clock_reasons(nvml, ask("nvmlDeviceGetCurrentClocksEventReasons", handle)),
    )


def _clock_reasons(nvml: Any, mask: int | None) -> list[str]:
    return [words for name, words in _CLOCK_REASONS.items() if mask and mask & getattr(nvml, name, 0)]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


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


def _bounded(function: Callable[[], None], timeout_s: float) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout_s)
