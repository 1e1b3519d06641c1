"""How far the collectives of torch.distributed have come, from torch's Flight Recorder, which counts those of every
backend. Its functions are private to torch, so they are looked up, never assumed."""

from __future__ import annotations

import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from runtime.telemetry.position import CollectivePosition

_DUMPS = ("_dump_nccl_trace", "_dump_fr_trace")
_BYTES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
"""Dtype, as the Flight Recorder writes it -> bytes of an element; others count as one byte."""
STANDS_S = 2.0
"""Without progress for this long the newest entry is read, too, for its operation: that takes a millisecond."""


class FlightPosition:
    """Call it from one thread. Returns None where torch has no Flight Recorder, or nothing was recorded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: CollectivePosition | None = None
        self._since = clock()

    def __call__(self) -> CollectivePosition | None:
        """The present position."""
        entered = completed = 0
        found = False
        for name in _DUMPS:
            for status in _dump(name, entries=False).get("pg_status", {}).values():
                found = True
                entered += max(0, int(status.get("last_enqueued_collective", 0)))
                completed += max(0, int(status.get("last_completed_collective", 0)))
        if not found:
            return None
        now = self._clock()
        last = self._last
        if last is None or (last.entered, last.completed) != (entered, completed):
            self._last, self._since = CollectivePosition(entered, completed), now
        elif entered > completed and not last.op and now - self._since >= STANDS_S:
            self._last = CollectivePosition(entered, completed, *_newest())
        return self._last


def _dump(name: str, entries: bool) -> Mapping[str, Any]:
    """One recorder's dump, without stacks; empty if it has none."""
    function = getattr(sys.modules.get("torch._C._distributed_c10d"), name, None)
    if function is None:
        return {}
    try:
        found: Mapping[str, Any] = pickle.loads(function(entries, False, False))  # bytes of our own process
    except Exception:  # private functions of torch, of any version: without one there is no position
        return {}
    return found


def _newest() -> tuple[str, int]:
    """Operation and input bytes of the newest collective."""
    newest: Mapping[str, Any] = {}
    for name in _DUMPS:
        for entry in (_dump(name, entries=True).get("entries") or [])[-1:]:
            if entry.get("time_created_ns", 0) >= newest.get("time_created_ns", 0):
                newest = entry
    op = str(newest.get("profiling_name", "")).split(":")[-1]
    sizes, dtypes = newest.get("input_sizes") or [], newest.get("input_dtypes") or []
    nbytes = sum(math.prod(size) * _BYTES.get(str(dtype), 1) for size, dtype in zip(sizes, dtypes, strict=False))
    return op, nbytes
