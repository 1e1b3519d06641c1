"""Records phase intervals, collectives and step results of the training thread in ring buffers that never block.

The training thread calls these methods, so they do only arithmetic and appends: no lock, no socket, no message objects.
One thread at a time may call them (autograd's device thread counts as the training thread, which waits for it).
`drain` and `position` belong to the publisher.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from types import TracebackType
from typing import Any, NamedTuple

from runtime.telemetry.device_phases import DevicePhases, Marks, Span, Sums
from runtime.wire.messages import PhaseName, StepResult

Place = tuple[PhaseName, int]
"""A phase, and the step in which it was."""
CollectiveRecord = tuple[int, str, int, int, int, int, int]
"""(seq, op, bytes, issue_ns, end_ns, duration_us, wait_us), as `Collectives` carries it."""

SPANS_KEPT = 4096
COLLECTIVES_KEPT = 8192
STEPS_KEPT = 1024
STEP_MASK = 0xFFFF
"""Mask of collective numbers: the steps of the newest 65536 issued collectives are remembered."""


class Drained(NamedTuple):
    """Everything recorded since the last drain, oldest first."""

    spans: list[Span]
    collectives: list[tuple[int, CollectiveRecord]]  # (step in which it was issued, record)
    steps: list[StepResult]
    dropped: int  # entries lost to full rings since the start


class _Step(NamedTuple):
    """An optimizer step with what the training thread has recorded since the last one."""

    result: StepResult
    phases: Sums
    waits: Sums
    comm_bytes: int

    @property
    def step(self) -> int:
        return self.result.step


class Position(NamedTuple):
    """The current state of the training thread, as in a `Heartbeat`."""

    phase: PhaseName
    step: int
    micro_step: int
    phase_since_ns: int
    entered_seq: int
    entered_op: str
    entered_bytes: int
    completed_seq: int
    progress_ns: int


class _Ring:
    """The reader's side of a bounded deque: takes all items and counts those that were overwritten in between.

    The writer counts its appends after making them, so `appended` is never ahead of the deque, and no loss is counted
    that did not happen.
    """

    def __init__(self, capacity: int) -> None:
        self.items: deque[Any] = deque(maxlen=capacity)
        self.taken = 0
        self.lost = 0

    def take(self, appended: int) -> list[Any]:
        items = self.items
        taken = [items.popleft() for _ in range(len(items))]
        self.taken += len(taken)
        self.lost = max(self.lost, appended - self.taken - len(items))
        return taken


class _SpanContext:
    """A phase inside another one, which then continues as a new interval, at the step reached by then."""

    __slots__ = ("_outer", "_phase", "_recorder")

    def __init__(self, recorder: Recorder, phase: PhaseName) -> None:
        self._recorder = recorder
        self._phase = phase
        self._outer: PhaseName = phase

    def __enter__(self) -> None:
        self._outer = self._recorder._now[0]
        self._recorder.enter(self._phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.enter(self._outer)


class Recorder:
    """The training thread's half of `Telemetry`."""

    def __init__(self) -> None:
        now = monotonic_ns()
        # One tuple, replaced as a whole: the heartbeat reads it from another thread and must not see half of a change.
        self._now: tuple[PhaseName, int, int, int] = ("init", 0, 0, now)  # phase, step, micro_step, since_ns
        self._entered: tuple[int, str, int] = (0, "", 0)  # seq, op, bytes
        self._completed_seq = 0
        self._progress_ns = now
        self._spans = _Ring(SPANS_KEPT)
        self._collectives = _Ring(COLLECTIVES_KEPT)
        self._steps = _Ring(STEPS_KEPT)
        # Bound once, to save an attribute look-up per call.
        self._append_span = self._spans.items.append
        self._append_collective = self._collectives.items.append
        self._spans_put = self._collectives_put = self._steps_put = 0
        self._issued_in_step: list[int] = [0] * (STEP_MASK + 1)
        self._previous_end_ns = 0
        self._counted_to_ns = now  # phase time up to here is in the sums of an earlier step
        self._phase_ns: dict[str, int] = {}
        self._wait_ns: dict[str, int] = {}  # by phase
        self._comm_bytes = 0
        self._device: DevicePhases | None = None
        self.phase_ended: Callable[[PhaseName, int, int], None] | None = None
        """Called by the training thread with each finished phase, its start and its end (ns); must not raise."""

    # ---- the training thread ---------------------------------------------------------------------------------------
    def enter(self, phase: PhaseName, step: int | None = None, micro_step: int | None = None) -> None:
        """End the current phase interval and begin the next; None keeps the step or micro-step.

        Both are 1-based: the step being worked on, and the micro-step of its accumulation (0 outside of one).
        """
        now = monotonic_ns()
        old_phase, old_step, old_micro_step, since = self._now
        device = self._device
        if device is None:
            self._append_span((old_phase, old_step, old_micro_step, since, now))
            self._spans_put += 1
        counted = self._counted_to_ns
        sums = self._phase_ns
        sums[old_phase] = sums.get(old_phase, 0) + now - (since if since > counted else counted)
        if step is None:
            step = old_step
        if micro_step is None:
            micro_step = old_micro_step
        self._now = (phase, step, micro_step, now)
        self._progress_ns = now
        if device is not None:
            device.begin(phase, step, micro_step, self._entered[0])
        if self.phase_ended is not None:
            self.phase_ended(old_phase, since, now)

    def follow_device(self, marks: Marks) -> None:
        """From now on a phase lasts as long as the device takes for it (device_phases.py). `position` stays with the
        training thread, which is what hangs."""
        phase, step, micro_step, _ = self._now
        device = DevicePhases(marks)
        device.begin(phase, step, micro_step, self._entered[0])
        self._device = device

    def span(self, phase: PhaseName) -> _SpanContext:
        """A context for a phase inside the current one, whose interval is interrupted so that no time counts twice."""
        return _SpanContext(self, phase)

    def issued(self, op: str, nbytes: int) -> int:
        """Record a collective that is being issued. Returns its number, from 1. Its bytes count for the current
        step."""
        seq = self._entered[0] + 1
        self._entered = (seq, op, nbytes)
        self._issued_in_step[seq & STEP_MASK] = self._now[1]
        self._comm_bytes += nbytes
        self._progress_ns = monotonic_ns()
        return seq

    @property
    def phase(self) -> PhaseName:
        """The current phase of the training thread."""
        return self._now[0]

    @property
    def place(self) -> Place:
        """Where the training thread is."""
        return self._now[:2]

    def completed(
        self,
        seq: int,
        op: str,
        nbytes: int,
        issue_ns: int,
        end_ns: int,
        wait_ns: int,
        place: Place | None = None,
    ) -> None:
        """Record a completed collective, in the order of issue. wait_ns: how long the training thread, or its device,
        has waited for it. place: where that was, if not in the current phase.

        Its duration starts at the later of its issue and the previous completion, until which the group was busy.
        """
        previous = self._previous_end_ns
        duration_ns = end_ns - (issue_ns if issue_ns > previous else previous)
        if end_ns > previous:
            self._previous_end_ns = end_ns
        if seq > self._completed_seq:
            self._completed_seq = seq
        where = place or self._now[:2]
        waited = where[0]
        self._wait_ns[waited] = self._wait_ns.get(waited, 0) + wait_ns
        # End times come from callbacks of the backend and may be out of order by microseconds.
        record = (seq, op, nbytes, issue_ns, end_ns, duration_ns // 1000 if duration_ns > 0 else 0, wait_ns // 1000)
        self._append_collective((self._issued_in_step[seq & STEP_MASK], record, where))
        self._collectives_put += 1
        self._progress_ns = monotonic_ns()

    def step(self, result: StepResult) -> None:
        """Record an optimizer step. phase_ms, phase_wait_ms, wait_ms and comm_bytes that `result` leaves at their
        default are filled in with what was recorded since the last step."""
        now = monotonic_ns()
        phase, _, _, since = self._now
        sums, self._phase_ns = self._phase_ns, {}
        sums.pop("init", None)  # time before the first step does not count
        sums[phase] = sums.get(phase, 0) + now - max(since, self._counted_to_ns)
        self._counted_to_ns = now
        waits, self._wait_ns = self._wait_ns, {}
        self._steps.items.append(_Step(result, sums, waits, self._comm_bytes))
        self._steps_put += 1
        self._comm_bytes = 0
        self._progress_ns = now

    # ---- the publisher ---------------------------------------------------------------------------------------------
    def drain(self, final: bool = False) -> Drained:
        """Take everything recorded since the last drain. final: steps that the device has not finished, too."""
        spans: list[Span] = self._spans.take(self._spans_put)
        taken = self._collectives.take(self._collectives_put)
        collectives = [(step, record) for step, record, _ in taken]
        steps: list[_Step] = self._steps.take(self._steps_put)
        lost = self._spans.lost + self._collectives.lost + self._steps.lost
        device = self._device
        if device is None:
            return Drained(spans, collectives, [_filled(one, one.phases, one.waits) for one in steps], lost)
        spans += device.spans()
        for _, record, (phase, step) in taken:
            device.waited(step, phase, 1000 * record[-1])
        results = device.filled(steps, self._completed_seq, _filled, final)
        return Drained(spans, collectives, results, lost + device.lost)

    def position(self) -> Position:
        """The current state of the training thread."""
        # In this order: otherwise a collective issued in between would show as completed but not entered.
        completed_seq = self._completed_seq
        entered_seq, entered_op, entered_bytes = self._entered
        phase, step, micro_step, since_ns = self._now
        return Position(
            phase, step, micro_step, since_ns, entered_seq, entered_op, entered_bytes, completed_seq, self._progress_ns
        )


def _filled(step: _Step, phase_ns: Sums, wait_ns: Sums) -> StepResult:
    result, update = step.result, dict[str, Any]()
    if not result.phase_ms:
        update["phase_ms"] = {phase: round(ns / 1e6, 3) for phase, ns in phase_ns.items()}
    if not result.wait_ms:
        update["wait_ms"] = round(sum(wait_ns.values()) / 1e6, 3)
    if not result.phase_wait_ms:
        update["phase_wait_ms"] = {phase: round(ns / 1e6, 3) for phase, ns in wait_ns.items() if ns}
    if not result.comm_bytes:
        update["comm_bytes"] = step.comm_bytes
    return result.model_copy(update=update)
