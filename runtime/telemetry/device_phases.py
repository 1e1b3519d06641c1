"""Phases as a GPU spends them.

The training thread only launches work: it is through a forward in a millisecond that takes the GPU a second, and waits,
if at all, wherever the launch queue is full. So a phase begins where the compute stream is when the training thread
enters it (a mark, in CUDA an event), and lasts until the stream comes to the next mark. Work that the GPU does beside
the stream takes no time in it, and neither does what the host does while the stream is busy: data that is loaded
meanwhile costs nothing. A stream that has nothing to do counts for the phase that launches the next work.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from runtime.wire.messages import PhaseName

Span = tuple[PhaseName, int, int, int, int]
"""(phase, step, micro_step, start_ns, end_ns), as `Phases` carries it."""
Sums = dict[str, int]
"""Phase -> ns."""

MARKS_KEPT = 8192
MOST_HELD = 2
"""Steps that are held back until the device has come to their end. Of more, the oldest is told with what is known."""


class Marks(Protocol):
    """Marks in the compute stream of a device."""

    def mark(self) -> Any:
        """Mark where the stream of the calling thread is, without waiting for it."""

    def reached(self, mark: Any) -> bool:
        """Whether the stream has come to the mark. On any thread."""

    def ns(self, mark: Any) -> int:
        """When it has, on CLOCK_MONOTONIC. On any thread."""


class _Begun(NamedTuple):
    """A phase that begins at a mark."""

    phase: PhaseName
    step: int
    micro_step: int
    mark: Any
    issued: int
    """Number of the newest collective by then."""


class DevicePhases:
    """The training thread calls `begin`, the publisher everything else."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._begun: deque[_Begun] = deque()
        self.lost = 0
        """Phases that were given up because nobody has asked for them for too long."""
        self._time: dict[int, Sums] = {}
        self._waits: dict[int, Sums] = {}
        self._issued_by_end: dict[int, int] = {}
        """Step that the stream has come to the end of -> number of the newest collective by then."""
        self._held: deque[Any] = deque()

    def begin(self, phase: PhaseName, step: int, micro_step: int, issued: int) -> None:
        """The training thread enters a phase. issued: number of the newest collective."""
        if len(self._begun) >= MARKS_KEPT:
            self.lost += 1
            return
        # After an error of the device every call fails, also those on the way out of the error, which says more.
        with contextlib.suppress(RuntimeError):
            self._begun.append(_Begun(phase, step, micro_step, self._marks.mark(), issued))

    def spans(self) -> list[Span]:
        """The phases that have ended since the last call, oldest first."""
        found: list[Span] = []
        begun, marks = self._begun, self._marks
        while len(begun) > 1 and marks.reached(begun[1].mark):
            one, following = begun.popleft(), begun[0]
            start_ns, end_ns = marks.ns(one.mark), marks.ns(following.mark)
            found.append((one.phase, one.step, one.micro_step, start_ns, max(start_ns, end_ns)))
            sums = self._time.setdefault(one.step, {})
            sums[one.phase] = sums.get(one.phase, 0) + max(0, end_ns - start_ns)
            if following.step != one.step:
                self._issued_by_end[one.step] = following.issued
        return found

    def waited(self, step: int, phase: PhaseName, ns: int) -> None:
        """The stream has waited for a collective, in this phase of this step."""
        sums = self._waits.setdefault(step, {})
        sums[phase] = sums.get(phase, 0) + ns

    def filled(
        self, steps: Iterable[Any], completed: int, fill: Callable[[Any, Sums, Sums], Any], final: bool = False
    ) -> list[Any]:
        """The steps that can be told now, in order. steps: those that were recorded since the last call, each with a
        `step` and the times of the host, `phases` and `waits`, which stand in where the device's are not known.
        completed: number of the newest collective that has been reported. fill: completes a step by its phases and
        waits. final: hold none back."""
        self._held.extend(steps)
        told = []
        while self._held:
            one = self._held[0]
            over = self._issued_by_end.get(one.step, completed + 1) <= completed
            if not over and not final and len(self._held) <= MOST_HELD:
                break
            self._held.popleft()
            told.append(fill(one, self._time.get(one.step) or one.phases, self._waits.get(one.step, {})))
            for known in (self._time, self._waits, self._issued_by_end):
                for step in [step for step in known if step <= one.step]:
                    known.pop(step)
        return told
