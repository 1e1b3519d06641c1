"""Reads the slow fields of all GPUs in a thread of its own, so that a call that hangs costs those fields only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from zerotop.probe.device import Device
from zerotop.probe.slowfields import GROUPS, Group, Reader

STALE_S = 5.0
"""Values older than their time to live and this are not shown any more."""
_IDLE_S = 0.25
"""How long the thread waits for GPUs to appear."""


class SlowValues(NamedTuple):
    """The slow fields of one GPU that are known, and those that the driver has not answered for `stale_s` seconds."""

    values: dict[str, Any]
    stale: tuple[str, ...] = ()
    stale_s: float = 0.0


class SlowReader:
    """Reads every group of every device when its time to live is over. `values` never waits."""

    def __init__(
        self, nvml: Any, groups: tuple[Group, ...] = GROUPS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._nvml = nvml
        self._groups = groups
        self._clock = clock
        self._lock = threading.Lock()
        self._devices: list[Device] = []
        self._read: dict[tuple[int, str], tuple[float, dict[str, Any]]] = {}
        """(device, group) -> when it was read, and what."""
        self._since: dict[int, float] = {}
        """Device -> when it was first seen."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml-slow", daemon=True)

    def start(self) -> None:
        """Start reading, as soon as there are devices."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that is stuck in the driver is left behind."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=0.5)

    def take_devices(self, devices: list[Device]) -> None:
        """Read these from now on."""
        with self._lock:
            self._devices = devices
            for device in devices:
                self._since.setdefault(device.index, self._clock())

    def values(self, device: Device) -> SlowValues:
        """What is known of a device now."""
        now, found, stale, stale_s = self._clock(), dict[str, Any](), list[str](), 0.0
        with self._lock:
            for group in self._groups:
                first = self._since.get(device.index, now)
                read_s, values = self._read.get((device.index, group.name), (first, dict.fromkeys(group.fields, 0)))
                known = (device.index, group.name) in self._read
                if now - read_s > (group.ttl_s if known else 0.0) + STALE_S:
                    stale += [name for name in group.fields if values.get(name) is not None]
                    stale_s = max(stale_s, now - read_s)
                elif known:
                    found.update(values)
        return SlowValues(found, tuple(stale), stale_s)

    def _run(self) -> None:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return  # the probe says why there are no GPUs
        readers: dict[Device, Reader] = {}
        due: dict[tuple[Device, str], float] = {}
        while not self._closing.is_set():
            with self._lock:
                devices = list(self._devices)
            now = self._clock()
            for device in devices:
                for group in self._groups:
                    if device.handle is None or device.lost or self._closing.is_set():
                        break
                    if due.get((device, group.name), now) > now:
                        continue
                    reader = readers.setdefault(device, Reader(device))
                    values = group.read(reader, devices)
                    due[device, group.name] = now + group.ttl_s
                    with self._lock:
                        self._read[device.index, group.name] = (self._clock(), values)
            self._closing.wait(max(0.02, min(due.values(), default=now + _IDLE_S) - self._clock()) if due else _IDLE_S)
        for reader in readers.values():
            reader.close()
        self._nvml.nvmlShutdown()
