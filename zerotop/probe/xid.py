"""XID errors: the numbers by which the NVIDIA driver reports a problem of a GPU, received through NVML.

The numbers and their meaning: https://docs.nvidia.com/deploy/xid-errors/
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import pynvml

_WAIT_MS = 200
_KEPT = 100

# Number -> (what happened, what to do).
_WORDS: dict[int, tuple[str, str]] = {
    13: (
        "a kernel of the program failed, usually because of an index out of bounds",
        "run it under compute-sanitizer, or with CUDA_LAUNCH_BLOCKING=1",
    ),
    31: (
        "the program accessed an invalid GPU address",
        "run it under compute-sanitizer, or with CUDA_LAUNCH_BLOCKING=1",
    ),
    32: ("the GPU got commands that it can't read", "if it comes again: check the PCIe link and the driver"),
    38: ("the driver's firmware failed", "update the driver"),
    43: ("the GPU stopped the program's work after an error of the program", "see the program's own error"),
    45: ("work was cleared away because the program ended or failed before", "see the error before this one"),
    46: ("the GPU stopped working", "reset it (nvidia-smi --gpu-reset), or reboot"),
    48: ("GPU memory lost data (an ECC error that can't be corrected)", "reset the GPU before it is used again"),
    61: ("the GPU's controller stopped", "reset the GPU"),
    62: ("the GPU's controller halted", "reset the GPU"),
    63: ("a bad spot of GPU memory was noted, to be replaced by spare memory", "reset the GPU when it is free"),
    64: ("a bad spot of GPU memory could not be replaced", "take the GPU out of use and have it replaced"),
    69: ("the GPU's compute engine failed", "if it comes again with another program: have the GPU checked"),
    74: ("an NVLink between GPUs failed", "reset the GPUs; if it comes again: check the NVLink bridges"),
    79: ("the GPU has fallen off the bus", "reboot; if it comes again: check power, cooling and how the card sits"),
    92: ("GPU memory corrects very many errors", "have the GPU checked"),
    94: (
        "GPU memory lost data of this program only (a contained ECC error)",
        "start the run again; reset the GPU when it is free",
    ),
    95: ("GPU memory lost data of any program (an uncontained ECC error)", "reset the GPU before it is used again"),
    109: ("the GPU took too long to change between programs", "update the driver; if it comes again: reset the GPU"),
    119: ("the GPU's system processor (GSP) does not answer the driver", "reset the GPU, or reboot; update the driver"),
    120: ("the GPU's system processor (GSP) failed", "reset the GPU, or reboot; update the driver"),
    121: ("the link between CPU and GPU (C2C) had errors", "reset the GPU when it is free"),
    140: ("GPU memory had ECC errors that were not recovered", "reset the GPU before it is used again"),
    143: ("the GPU could not be initialized", "reboot"),
    154: ("the driver says that the GPU needs a recovery", "nvidia-smi -q names it, under GPU Recovery Action"),
}
FATAL = frozenset({46, 48, 62, 64, 74, 79, 92, 94, 95, 119, 120, 140, 143})
"""After these a GPU is not to be trusted until it has been reset or checked. The others are errors of the program,
follow from an earlier one, or are dealt with by the driver."""


@dataclass(frozen=True)
class Xid:
    """One XID error."""

    number: int
    gpu: int | None
    """The index of the GPU; None if it does not even answer that."""
    uuid: str
    wall_s: float

    @property
    def fatal(self) -> bool:
        """Whether the GPU is at fault."""
        return self.number in FATAL

    @property
    def fault(self) -> str:
        """What happened and what to do, without the GPU: "XID 79: the GPU has fallen off the bus; reboot; if ..."."""
        what, way_out = _WORDS.get(self.number, ("", "see NVIDIA's list of XID errors and the kernel's log (dmesg)"))
        return f"XID {self.number}" + (f": {what}" if what else "") + f"; {way_out}"

    @property
    def text(self) -> str:
        """The same with the GPU."""
        return f"{'a GPU' if self.gpu is None else f'GPU {self.gpu}'}: {self.fault}"


class XidWatch:
    """Listens in a thread of its own, because NVML waits in C. Where NVML or a GPU does not support such events,
    there are none."""

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        self._heard: deque[Xid] = deque(maxlen=_KEPT)
        self.faults: dict[str, Xid] = {}
        """UUID -> the newest fatal error of that GPU."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xid", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that is stuck in the driver is left behind."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * _WAIT_MS / 1000)

    def take(self) -> list[Xid]:
        """The errors since the last call, oldest first. Never waits."""
        heard = []
        while self._heard:
            heard.append(self._heard.popleft())
        return heard

    def _run(self) -> None:
        nvml = self._nvml
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return  # the probe says why there are no GPUs
        try:
            events = nvml.nvmlEventSetCreate()
            try:
                self._listen(events)
            finally:
                nvml.nvmlEventSetFree(events)
        except (nvml.NVMLError, AttributeError):  # not supported by this driver, or not known to this binding
            return
        finally:
            nvml.nvmlShutdown()

    def _listen(self, events: Any) -> None:
        nvml = self._nvml
        gpus: dict[Any, tuple[int, str]] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                gpus[_key(handle)] = (index, _text(nvml.nvmlDeviceGetUUID(handle)))
            except nvml.NVMLError:  # this one knows no events, or is lost already
                continue
        while gpus and not self._closing.is_set():
            try:
                event = nvml.nvmlEventSetWait_v2(events, _WAIT_MS)
            except nvml.NVMLError_Timeout:
                continue
            except nvml.NVMLError_GpuIsLost:  # its XID has come, or comes: the others go on
                self._closing.wait(_WAIT_MS / 1000)
                continue
            # Looked up beforehand: a GPU that has fallen off the bus does not answer.
            known = gpus.get(_key(event.device))
            gpu, uuid = known if known is not None else (None, "")
            xid = Xid(int(event.eventData), gpu, uuid, time.time())
            if xid.fatal and uuid:
                self.faults[uuid] = xid
            self._heard.append(xid)


def _key(handle: Any) -> Any:
    """The address in an NVML handle: each call returns another object for it."""
    return ctypes.cast(handle, ctypes.c_void_p).value if isinstance(handle, ctypes._Pointer) else handle


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
