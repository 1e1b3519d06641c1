"""Numbers that a device computes, read when they have arrived; and how far its host may be ahead of it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

RUN_AHEAD = 2
"""Steps that the host may have launched and the device not finished. Enough to keep it busy, and so few that all ranks
are known to be near each other: [Note: how foreign ranks agree] in control.py."""


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


class Pace:
    """Keeps the host of a GPU at most RUN_AHEAD steps ahead of it. On a CPU it is never ahead."""

    def __init__(self, mark: Callable[[], Any] | None) -> None:
        """mark: records an event where the device is; None: there is none to run ahead of."""
        self._mark, self._marks = mark, deque[Any]()

    @classmethod
    def of(cls, device: str) -> Pace:
        """For "cuda:1", "cpu", ..."""
        if device.split(":")[0] != "cuda":
            return cls(None)
        torch = sys.modules["torch"]

        def mark() -> Any:
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream())
            return event

        return cls(mark)

    @property
    def ahead(self) -> int:
        """How many steps the host may be ahead."""
        return 0 if self._mark is None else RUN_AHEAD

    def step(self) -> None:
        """A step has been launched: wait until the device has finished the one RUN_AHEAD steps before."""
        if self._mark is None:
            return
        self._marks.append(self._mark())
        if len(self._marks) > RUN_AHEAD:
            self._marks.popleft().synchronize()
