"""Reads the slow fields of each GPU in a thread of its own, so that a call that hangs costs the slow fields of that GPU
only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from zerotop.probe.device import Device
from zerotop.probe.slowfields import GROUPS, Group, Reader

STALE_S = 5.0
"""Values older than their time to live and this are not shown any more."""
LEAST_WAIT_S = 0.2
"""Between two rounds, also while a GPU is lost."""
CLOSE_S = 0.5


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
        self._since: dict[Device, float] = {}
        """When its thread was started."""
        self._read: dict[tuple[Device, str], tuple[float, dict[str, Any]]] = {}
        """(device, name of the group) -> when it was read, and what."""
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()

    def take_devices(self, devices: list[Device]) -> None:
        """Read these from now on."""
        with self._lock:
            self._devices = devices
            fresh = [device for device in devices if device not in self._since]
            self._since |= dict.fromkeys(fresh, self._clock())
        for device in fresh:
            thread = threading.Thread(target=self._run, args=(device,), name=f"nvml-slow-{device.index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """End the threads; those that are stuck in the driver are left behind."""
        self._closing.set()
        end = time.monotonic() + CLOSE_S
        for thread in list(self._threads):
            if thread.is_alive():  # one that is only about to be started ends by itself
                thread.join(timeout=max(0.0, end - time.monotonic()))

    def values(self, device: Device) -> SlowValues:
        """What is known of a device now."""
        now, found, stale, stale_s = self._clock(), dict[str, Any](), list[str](), 0.0
        with self._lock:
            for group in self._groups:
                entry = self._read.get((device, group.name))
                if entry is None:  # not read yet, or the first call hangs
                    age_s, values, expected_s = now - self._since.get(device, now), None, STALE_S
                else:
                    age_s, values, expected_s = now - entry[0], entry[1], group.ttl_s + STALE_S
                if age_s > expected_s:
                    stale += [name for name in group.fields if values is None or values.get(name) is not None]
                    stale_s = max(stale_s, age_s)
                elif values is not None:
                    found.update(values)
        return SlowValues(found, tuple(stale), stale_s)

    def _run(self, device: Device) -> None:
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return  # the driver went away since the devices were listed; the probe says so
        # The links are those to all other GPUs, so these must have been found; but none waits for one that hangs.
        patience_s = self._clock() + STALE_S
        while not self._closing.is_set() and self._clock() < patience_s and not self._all_looked_up():
            self._closing.wait(0.02)
        reader = Reader(device)
        due = {group.name: 0.0 for group in self._groups}
        while not self._closing.is_set():
            for group in self._groups:
                now = self._clock()
                if due[group.name] <= now and device.handle is not None and not device.lost:
                    values = group.read(reader, self._devices)
                    due[group.name] = now + group.ttl_s
                    with self._lock:
                        self._read[device, group.name] = (self._clock(), values)
            # A GPU that is lost is looked for by the probe, once per tick.
            self._closing.wait(max(LEAST_WAIT_S, min(due.values()) - self._clock()))
        reader.close()
        self._nvml.nvmlShutdown()

    def _all_looked_up(self) -> bool:
        return all(device.looked_up for device in self._devices)
