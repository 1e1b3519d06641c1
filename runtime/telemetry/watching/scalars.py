"""Numbers that a device computes, read when they have arrived: nobody waits for it."""

from __future__ import annotations

import sys
from typing import Any


class LateNumber:
    """A loss or norm, as a Python number or a tensor of one element."""

    def __init__(self, value: Any) -> None:
        self._number: float | None = None
        self._event: Any = None
        if value is None or isinstance(value, int | float):
            self._number = None if value is None else float(value)
            return
        value = value.detach()
        if value.device.type != "cuda":
            self._number = float(value)
            return
        torch = sys.modules["torch"]
        self._arriving = torch.empty((), dtype=torch.float32, device="cpu", pin_memory=True)
        self._arriving.copy_(value.float().reshape(()), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    @property
    def arrived(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())

    def read(self) -> float | None:
        """The number, which may be NaN or infinite; None if there is none. Waits for the device if it must."""
        if self._event is not None:
            self._event.synchronize()
            self._number, self._event = float(self._arriving), None
        return self._number
