"""The collectives of torch.distributed, from torch's Flight Recorder, which has those of every backend: how far they
have come, and which ones each step has issued. Its functions are private to torch, so they are looked up, never
assumed.

[Note: what the Flight Recorder costs]
How many collectives were issued is known in 20 us. Their operations and sizes come only with all of the recorder's
entries, while Python's lock is held: 1 ms with 100 entries, 20 ms with the 2000 that `zerotop run` asks for. So they
are read when a step has another number of collectives than the one that was read last, or AGAIN_S later, and seldom
enough to take SHARE of the time. That shows some of the steps, each of them in full; in most runs the first ones, when
the recorder has few entries.

Gloo's entries have the time of issue, never that of completion; NCCL's have a duration where TORCH_NCCL_ENABLE_TIMING
is set. For how long a rank has waited in a single collective is in neither.
"""

from __future__ import annotations

import itertools
import math
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from runtime.telemetry.position import CollectivePosition
from runtime.wire.messages import Collectives, CountedCollectives

_DUMPS = ("_dump_nccl_trace", "_dump_fr_trace")
_BYTES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
"""Dtype, as the Flight Recorder writes it -> bytes of an element; others count as one byte."""
STANDS_S = 2.0
"""Without progress for this long the newest entry is read, too, for its operation: that takes a millisecond."""

SHARE = 0.002
"""Of the time that may go into reading all entries."""
AGAIN_S = 60.0
"""After so long all entries are read again, although nothing seems to have changed."""
STEPS_KEPT = 64
"""Newest steps whose collectives are looked for."""


class FlightPosition:
    """Call it from one thread. Returns None where torch has no Flight Recorder, or nothing was recorded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: CollectivePosition | None = None
        self._since = clock()

    def __call__(self) -> CollectivePosition | None:
        """The present position."""
        at = _entered_and_completed()
        if at is None:
            return None
        entered, completed = at
        now = self._clock()
        last = self._last
        if last is None or (last.entered, last.completed) != (entered, completed):
            self._last, self._since = CollectivePosition(entered, completed), now
        elif entered > completed and not last.op and now - self._since >= STANDS_S:
            self._last = CollectivePosition(entered, completed, *_newest())
        return self._last


class StepCollectives:
    """Which collectives each step has issued. `step_ended` is for the training thread, `take` for another one."""

    def __init__(self, rank: int, start_step: int) -> None:
        self._rank = rank
        begun = (start_step, time.monotonic_ns(), collectives_entered() or 0)
        self._ends: deque[tuple[int, int, int]] = deque([begun], maxlen=STEPS_KEPT)
        """(step, its end, how many collectives there were by then)."""
        self._usual, self._again_at = -1, 0.0
        """How many the newest step had that was read."""
        self._taken = start_step
        """The newest step that was looked at."""
        self._not_before = 0.0

    def step_ended(self, step: int) -> None:
        """What is issued from now on belongs to the next step."""
        self._ends.append((step, time.monotonic_ns(), collectives_entered() or 0))

    def take(self, final: bool = False) -> list[Collectives]:
        """The collectives of the steps since the last call, of those that the recorder still has in full; see the note.
        final: there is no later call."""
        ends, now = list(self._ends), time.monotonic()
        if ends[-1][0] <= self._taken or (now < self._not_before and not final):
            return []
        issued = [b[2] - a[2] for a, b in itertools.pairwise(ends) if b[0] > self._taken]
        if now < self._again_at and all(number == self._usual for number in issued):
            self._taken = ends[-1][0]
            return []
        wall_ns = time.time_ns() - time.monotonic_ns()  # entries have wall time
        found: dict[int, dict[tuple[str, int], list[float | None]]] = {}
        oldest_ns = 0
        for name in _DUMPS:
            entries = _dump(name, entries=True).get("entries") or []
            if entries and entries[0].get("record_id", 0) > 0:  # older ones were overwritten
                oldest_ns = max(oldest_ns, int(entries[0].get("time_created_ns", 0)) - wall_ns)
            for entry in entries:
                step = _step_at(ends, int(entry.get("time_created_ns", 0)) - wall_ns)
                if step > self._taken:
                    found.setdefault(step, {}).setdefault(_kind(entry), []).append(entry.get("duration_ms"))
        took = time.monotonic() - now
        self._not_before = now + took / SHARE
        whole = {step for (_, begin, _), (step, _, _) in itertools.pairwise(ends) if begin > oldest_ns}
        self._taken = ends[-1][0]
        if self._taken in found and self._taken in whole:
            self._usual = sum(len(durations) for durations in found[self._taken].values())
            self._again_at = now + AGAIN_S
        return [
            Collectives.model_construct(rank=self._rank, step=step, records=[], counted=_counted(kinds))
            for step, kinds in sorted(found.items())
            if step in whole
        ]


def collectives_entered() -> int | None:
    """How many collectives this process has issued; None where torch does not tell."""
    at = _entered_and_completed()
    return at[0] if at is not None else None


def _entered_and_completed() -> tuple[int, int] | None:
    entered = completed = 0
    found = False
    for name in _DUMPS:
        for status in _dump(name, entries=False).get("pg_status", {}).values():
            found = True
            entered += max(0, int(status.get("last_enqueued_collective", 0)))
            completed += max(0, int(status.get("last_completed_collective", 0)))
    return (entered, completed) if found else None


def _step_at(ends: list[tuple[int, int, int]], at_ns: int) -> int:
    """The step in which something happened; 0 if that was before the first one or after the last."""
    if at_ns <= ends[0][1]:
        return 0
    return next((step for step, end_ns, _ in ends if at_ns <= end_ns), 0)


def _counted(kinds: Mapping[tuple[str, int], list[float | None]]) -> list[CountedCollectives]:
    counted = []
    for (op, nbytes), durations in kinds.items():
        timed = [one for one in durations if one is not None]
        mean = sum(timed) / len(timed) if timed and len(timed) == len(durations) else None
        counted.append((op, nbytes, len(durations), mean))
    return counted


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
    return _kind(newest)


def _kind(entry: Mapping[str, Any]) -> tuple[str, int]:
    """Operation and input bytes of an entry."""
    op = str(entry.get("profiling_name", "")).split(":")[-1]
    sizes, dtypes = entry.get("input_sizes") or [], entry.get("input_dtypes") or []
    nbytes = sum(math.prod(size) * _BYTES.get(str(dtype), 1) for size, dtype in zip(sizes, dtypes, strict=False))
    return op, nbytes
