"""One GPU as NVML answers about it: what it does not support is asked once; a GPU that is lost stays in the list."""

from __future__ import annotations

from typing import Any

LOST = "GPU is lost or not accessible"
_NO_PERMISSION = 4
_GPU_IS_LOST = 15
_REFUSALS = frozenset({3, _NO_PERMISSION, 13, 25, 26})
"""NVML's errors that come again however often one asks: not supported, no permission, unknown function, unknown
version of a structure, deprecated."""
_NOT_AVAILABLE = 2**32 - 1
"""What NVML puts into a 32-bit figure that it does not have."""


class Device:
    """GPU number `index`. Used by the thread for quick fields and by the one for slow fields."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml = nvml
        self.index = index
        self.handle: Any = None
        """None until `open` has found it."""
        self.looked_up = False
        """Whether `open` has had an answer, of whichever kind."""
        self.uuid = ""
        self.name = ""
        self.lost = False
        """Whether the driver has said that the GPU is gone, since the last successful `open`."""
        self.denied: set[str] = set()
        """Fields that this user may not read."""
        self._refused: set[tuple[str, str]] = set()

    def open(self) -> bool:
        """Look the GPU up, once per sample. False if it is not there; its name and UUID are kept if they were
        known."""
        self.lost = False
        handle = self.ask("uuid", "nvmlDeviceGetHandleByIndex", self.index)
        if handle is None:
            self.looked_up = True
            return False
        self.handle, self.looked_up = handle, True
        if not self.uuid:
            self.uuid = _text(self.ask("uuid", "nvmlDeviceGetUUID", handle))
        if not self.name:
            self.name = _text(self.ask("name", "nvmlDeviceGetName", handle))
        return not self.lost

    def ask(self, field: str, function: str, *arguments: Any, remember: bool = True) -> Any:
        """NVML's answer for a field of GpuStats; None if there is none. `remember`: do not ask again for what is not
        supported."""
        if (field, function) in self._refused:
            return None
        try:
            return getattr(self.nvml, function)(*arguments)
        except AttributeError:  # not known to this version of the binding
            self._refused.add((field, function))
        except self.nvml.NVMLError as error:
            self.note_error(field, function, getattr(error, "value", None), remember)
        return None

    def note_error(self, field: str, function: str, code: int | None, remember: bool = True) -> None:
        """Take an error that NVML answered with, by its number."""
        self.lost = self.lost or code == _GPU_IS_LOST
        if code in _REFUSALS and remember:
            self._refused.add((field, function))
        if code == _NO_PERMISSION:
            self.denied.add(field)

    def number(self, field: str, function: str, *arguments: Any, scale: float = 1.0) -> float | None:
        """`ask` for a figure, times `scale`."""
        value = self.ask(field, function, *arguments)
        return None if value is None or value == _NOT_AVAILABLE else value * scale

    def count(self, field: str, function: str, *arguments: Any) -> int | None:
        """`ask` for a whole number."""
        value = self.ask(field, function, *arguments)
        return None if value is None or value == _NOT_AVAILABLE or value >= 2**63 else int(value)

    def refused(self, field: str, function: str) -> bool:
        """Whether the GPU has said that it does not support this."""
        return (field, function) in self._refused


def percent(value: float | None) -> float | None:
    """A share in percent to one decimal; None if it is not one."""
    return round(value, 1) if value is not None and 0 <= value <= 100 else None


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
