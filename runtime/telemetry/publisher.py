"""Telemetry of one rank: the training thread records, and the publisher thread sends and receives commands.

The training thread never waits for the hub and uses no socket. The publisher thread owns both sockets:

- PUB, one packet per tick: phases, collectives, step results, memory, always a heartbeat. Dropped if not read.
- DEALER, events in numbered packets that the hub may request again; in the other direction, commands.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.process.forked import Owner, at_exit
from runtime.telemetry import stopsignal
from runtime.telemetry.bounds import ERROR_KEPT, shortened, shortened_error
from runtime.telemetry.clipping import clipped_evaluation, clipped_report
from runtime.telemetry.compiling import Compilations
from runtime.telemetry.flight_recorder import FlightWriter
from runtime.telemetry.handler import LevelName, TelemetryHandler
from runtime.telemetry.inbox import Inbox
from runtime.telemetry.link import Link
from runtime.telemetry.null import NullTelemetry, Outcome, Severity
from runtime.telemetry.orphan import SupervisorWatch, grace_s
from runtime.telemetry.position import CollectivePosition
from runtime.telemetry.recorder import Position, Recorder
from runtime.wire.finetuning import DataReport, Evaluation
from runtime.wire.messages import (
    Ack,
    CheckpointSaved,
    Collectives,
    Command,
    Event,
    FlightRequest,
    Goodbye,
    Heartbeat,
    Hello,
    LogRecord,
    Memory,
    Phases,
    Resend,
)
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, SUPERVISOR_VARIABLE, Sockets, read_run

SPANS_PER_PACKET = 500
EVENTS_KEPT = 20_000
LOGS_KEPT = 5_000
"""Queue length beyond which log records are dropped, so that they can't displace events."""
MEMORY_INTERVAL_S = 1.0
MEMORY_INTERVAL_CHANGED_S = 0.1
LONGEST_SLEEP_S = 0.25
"""Longest sleep of the publisher, and so longest delay of a log record, which does not wake it."""


class TelemetryError(Exception):
    """The environment of the run is inconsistent: a variable or the run directory is wrong."""


class Telemetry(Recorder):
    """The telemetry of one rank; one per process. `Recorder` has the methods of the training thread."""

    def __init__(self, rank: int, attempt: int, sockets: Sockets, supervisor_pid: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.attempt = attempt
        self.inbox = Inbox()
        self.memory_source: Callable[[], Memory] | None = None
        self.completed_on_device: Callable[[], int] | None = None
        """Called by the publisher for the heartbeat: sequence number of the newest collective that has ended on the
        device. `completed` is called later, with its times."""
        self.collective_position: Callable[[], CollectivePosition | None] | None = None
        """Called by the publisher for the heartbeat, where the collectives are not recorded here. `None` leaves what is
        recorded."""
        self.counted_collectives: Callable[[bool], list[Collectives]] | None = None
        """Called by the publisher for those of whole steps, where single ones are not recorded here; True: for the last
        time."""
        self.log_handler = TelemetryHandler(self.log)
        self._logger = logging.getLogger("runtime")
        self.adoptable = False
        self._sockets = sockets
        self._supervisor_pid = supervisor_pid
        self._watch: SupervisorWatch | None = None
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="zerotop-telemetry", daemon=True)
        self._events: deque[Any] = deque(maxlen=EVENTS_KEPT)
        self._logs_dropped = 0
        self._collectives_seen = (0, 0)
        self._collectives_seen_ns = 0
        self._hz = 5.0
        self._micro_steps = 1
        self._memory_due = False
        self._memory_at = -math.inf
        self._said_goodbye = False
        self._owner = Owner()
        self._at_exit: Callable[[], Any] | None = None
        self._close_by: float | None = None
        self._reported: set[str] = set()
        self._flight = FlightWriter(rank, attempt)
        self._compilations = Compilations()

    @classmethod
    def from_environment(cls, rank: int) -> Telemetry | NullTelemetry:
        """Telemetry of the run in ZEROTOP_RUN, or NullTelemetry outside a run. Raises TelemetryError."""
        folder = os.environ.get(RUN_VARIABLE, "")
        if not folder:
            return NullTelemetry()
        try:
            run = read_run(Path(folder))
        except (OSError, ValueError) as error:
            raise TelemetryError(
                f"{RUN_VARIABLE}={folder} is not a run directory: {_first_line(error)}. `zerotop launch` sets this "
                "variable; unset it to train without telemetry"
            ) from None
        with joining:
            _joined.add(rank)
            if (early := _adoptable.pop(rank, None)) is not None:
                return early
        attempt = _number(ATTEMPT_VARIABLE, run.attempt)
        return cls(rank, attempt, Sockets(run.sockets), _number(SUPERVISOR_VARIABLE, None))

    @property
    def started(self) -> bool:
        """Whether `start` has been called."""
        return self._link is not None

    def offer(self) -> None:
        """Let the next `from_environment` and `start` in this process take over this telemetry, which has begun without
        a trainer, or whose trainer is done: the hub knows one connection of a rank."""
        self.adoptable = True
        _adoptable[self.rank] = self

    # ---- life ------------------------------------------------------------------------------------------------------
    def start(self, hello: Hello) -> None:
        """Open the sockets, start the threads, send `hello` and, from now on, log records. Raises TelemetryError."""
        if self._link is not None and self.adoptable:
            self.adoptable = self._said_goodbye = False
            self.hz = hello.telemetry_hz
            self.enter(self.phase, hello.start_step + 1, 0)
            self.introduce(hello)
            return
        if self._link is not None:
            raise RuntimeError("telemetry was started already")
        try:
            seconds = grace_s()
            self._link = Link(self._sockets, self.rank, self.attempt, self._report_once)
        except (ValueError, OSError) as error:
            raise TelemetryError(str(error)) from None
        self._hz = hello.telemetry_hz
        self._micro_steps = hello.accumulation
        phase, step, micro_step, since_ns = self._now
        if step == 0:
            self._now = (phase, hello.start_step + 1, micro_step, since_ns)
        self._events.appendleft(hello)
        self._thread.start()
        if self._supervisor_pid is not None:
            self._watch = SupervisorWatch(self._supervisor_pid, self._supervisor_gone, seconds)
            self._watch.start()
            stopsignal.supervisor_is_watched()
        # A handler on a bare root logger would turn a script's later logging.basicConfig() into a no-op.
        self._logger = logging.getLogger() if logging.getLogger().handlers else logging.getLogger("runtime")
        self._logger.addHandler(self.log_handler)
        self._at_exit = at_exit(self.close)

    def introduce(self, hello: Hello) -> None:
        """Send another `hello` of this rank: more is known of it now."""
        self._micro_steps = hello.accumulation
        self._send_event(hello)

    def goodbye(
        self, outcome: Outcome, step: int, error: str = "", fatal: bool = False, culprit: int | None = None
    ) -> None:
        """Send how the rank ends, before `close`. Only the first call counts, because later errors are not the cause.
        Does nothing in a forked child.

        fatal: whether a restart would fail in the same way, so that the supervisor makes none. culprit: the rank that
        has caused the failure, if known.
        """
        if self._said_goodbye or not self._owner.is_here:
            return
        self._said_goodbye = True
        self._send_event(
            Goodbye(
                rank=self.rank,
                outcome=outcome,
                step=step,
                error=shortened_error(error),
                fatal=fatal,
                culprit=culprit,
                wall_s=time.time(),
            )
        )

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is left, for at most timeout_s seconds, and end the threads. Idempotent; also runs at exit. Does
        nothing in a forked child.

        If the supervisor is gone, the grace timer goes on, so that a process that hangs at exit is ended.
        """
        if self._link is None or self._close_by is not None or not self._owner.is_here:
            return
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)
        self._logger.removeHandler(self.log_handler)
        self._close_by = time.monotonic() + timeout_s
        self._link.wake()
        # The thread keeps to the time itself, unless memory_source hangs; then it is left behind (a daemon thread).
        self._thread.join(timeout_s + 0.5)
        if self._watch is not None and not self._watch.gone:
            self._watch.stop()

    @property
    def hz(self) -> float:
        """Telemetry packets per second. A change takes effect at the next tick and is sent as an event."""
        return self._hz

    @hz.setter
    def hz(self, value: float) -> None:
        if not (math.isfinite(value) and 0 < value <= 1000):
            raise ValueError(f"telemetry_hz: expected a number above 0, up to 1000, got {value}")
        if value == self._hz:
            return
        self._hz = float(value)
        self.event("telemetry_hz", f"telemetry at {value:g} packets per second", data={"telemetry_hz": self._hz})

    # ---- messages that may not be lost: any thread -------------------------------------------------------------------
    def event(
        self,
        what: str,
        text: str,
        *,
        severity: Severity = "info",
        step: int | None = None,
        data: dict[str, Any] | None = None,
        of_run: bool = False,
    ) -> None:
        """Send an event. what: its kind, a stable identifier. data: JSON. of_run: whether it concerns the run and not
        only this rank."""
        self._send_event(
            Event(
                rank=None if of_run else self.rank,
                what=what,
                text=shortened(text, ERROR_KEPT),
                severity=severity,
                step=step,
                data=data or {},
                wall_s=time.time(),
            )
        )

    def checkpoint_saved(self, step: int, path: str, *, seconds: float, blocked_ms: float) -> None:
        """A checkpoint is complete on disk, `seconds` after it was begun; training waited for `blocked_ms` of them."""
        self._send_event(
            CheckpointSaved(
                rank=self.rank,
                step=step,
                path=path,
                seconds=round(seconds, 3),
                blocked_ms=round(blocked_ms, 1),
                wall_s=time.time(),
            )
        )

    def data_report(self, report: DataReport) -> None:
        """Send what is trained or evaluated on, shortened to what a screen can show. Rank 0 calls it."""
        self._send_event(clipped_report(report))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Send the result of an evaluation, with shortened texts. Rank 0 calls it."""
        self._send_event(clipped_evaluation(evaluation))

    def log(self, level: LevelName, text: str, logger: str = "runtime", wall_s: float | None = None) -> None:
        """Send one log record. `log_handler` calls this; it is on the root logger if that has handlers, else on
        `runtime`."""
        if len(self._events) >= LOGS_KEPT:
            self._logs_dropped += 1
            return
        wall_s, text = wall_s or time.time(), shortened(text, ERROR_KEPT)
        self._events.append(LogRecord(rank=self.rank, level=level, logger=logger, text=text, wall_s=wall_s))

    def ack(self, ack: Ack) -> None:
        """Send the answer to a command, with rank and wall_s filled in."""
        reason = shortened(ack.reason, ERROR_KEPT)
        changes = {"rank": self.rank, "reason": reason, "wall_s": ack.wall_s or time.time()}
        self._send_event(ack.model_copy(update=changes))

    def memory_changed(self) -> None:
        """Send a Memory message within 0.1 s instead of at the next full second."""
        if not self._memory_due:
            self._memory_due = True
            self._wake()

    def _send_event(self, message: Any) -> None:
        self._events.append(message)
        self._wake()

    def _wake(self) -> None:
        if self._link is not None and self._close_by is None and self._owner.is_here:
            self._link.wake()

    # ---- the publisher thread --------------------------------------------------------------------------------------
    def _run(self) -> None:
        assert self._link is not None
        next_tick = time.monotonic()
        while self._close_by is None:
            now = time.monotonic()
            if self._memory_due:
                next_tick = min(next_tick, max(now, self._memory_at + MEMORY_INTERVAL_CHANGED_S))
            next_tick = min(next_tick, now + 1 / self._hz)  # the rate may have gone up since
            try:
                for message in self._link.wait(min(max(0.0, next_tick - now), LONGEST_SLEEP_S)):
                    self._receive(message)
                if self.inbox.orphaned:
                    self._log_orphaned()
                self._send_events()
                now = time.monotonic()
                if now >= next_tick:
                    # Late ticks are skipped: a burst of packets would say no more than the newest one.
                    next_tick = max(next_tick + 1 / self._hz, now)
                    self._link.publish(self._tick(now))
            except Exception:
                self._report_once(f"telemetry failed: {traceback.format_exc()}")
                time.sleep(1 / self._hz)
        self._finish()

    def _finish(self) -> None:
        assert self._link is not None and self._close_by is not None
        try:
            # Without memory, whose source may be shutting down.
            self._link.publish(self._measured(final=True))
            self._send_events()
        except Exception:
            print(f"zerotop: the last telemetry was lost: {traceback.format_exc()}", file=sys.stderr)
        finally:
            self._link.close(0.0 if self.inbox.orphaned else max(0.0, self._close_by - time.monotonic()))

    def _tick(self, now: float) -> list[Any]:
        messages = self._measured()
        if now - self._memory_at < (MEMORY_INTERVAL_CHANGED_S if self._memory_due else MEMORY_INTERVAL_S):
            return messages
        self._memory_at = now
        self._memory_due = False
        if self.memory_source is not None:
            try:
                messages.append(self.memory_source())
            except Exception as error:
                self._report_once(f"memory can't be measured: {type(error).__name__}: {error}")
        return messages

    def _measured(self, final: bool = False) -> list[Any]:
        """Messages of what the training thread has recorded since the last tick, and a heartbeat."""
        # model_construct: these figures need no validation, and this runs ten times a second during training.
        drained = self.drain(final)
        messages: list[Any] = []
        if drained.spans:
            spans = drained.spans[-SPANS_PER_PACKET:]
            messages.append(Phases.model_construct(rank=self.rank, micro_steps=self._micro_steps, spans=spans))
        by_step: dict[int, list[Any]] = {}
        for step, record in drained.collectives:
            by_step.setdefault(step, []).append(record)
        for step, records in by_step.items():
            messages.append(Collectives.model_construct(rank=self.rank, step=step, records=records))
        if self.counted_collectives is not None:
            messages += self.counted_collectives(final)
        messages += drained.steps
        # Before the position: nothing shows as completed that has not been entered.
        completed = self.completed_on_device() if self.completed_on_device is not None else 0
        at = self.position()
        if self.collective_position is not None and (seen := self.collective_position()) is not None:
            at = self._with_collectives(at, seen)
        elif completed > at.completed_seq:
            seen = CollectivePosition(at.entered_seq, completed, at.entered_op, at.entered_bytes)
            at = self._with_collectives(at, seen)
        self._compilations.look()
        messages.append(
            Heartbeat.model_construct(
                rank=self.rank,
                phase=at.phase,
                phase_since_ns=at.phase_since_ns,
                step=at.step,
                micro_step=at.micro_step,
                micro_steps=self._micro_steps,
                entered_seq=at.entered_seq,
                completed_seq=at.completed_seq,
                entered_op=at.entered_op,
                entered_bytes=at.entered_bytes,
                progress_ns=max(at.progress_ns, self._compilations.changed_ns),
                compiling=self._compilations.active,
                dropped=drained.dropped,
                now_ns=time.monotonic_ns(),
            )
        )
        return messages

    def _with_collectives(self, at: Position, seen: CollectivePosition) -> Position:
        """`at` with the collectives that somebody else counts. That one has completed is progress."""
        if (seen.entered, seen.completed) != self._collectives_seen:
            self._collectives_seen = (seen.entered, seen.completed)
            self._collectives_seen_ns = time.monotonic_ns()
        return at._replace(
            entered_seq=seen.entered,
            completed_seq=seen.completed,
            entered_op=seen.op,
            entered_bytes=seen.nbytes,
            progress_ns=max(at.progress_ns, self._collectives_seen_ns),
        )

    def _send_events(self) -> None:
        assert self._link is not None
        events = [self._events.popleft() for _ in range(len(self._events))]
        if self._logs_dropped and len(self._events) < LOGS_KEPT:
            dropped, self._logs_dropped = self._logs_dropped, 0
            text = f"{dropped} log records were dropped (too many to send); the rank's log file has them"
            events.append(self._own_record("warning", text))
        if events or self._link.outbox.next_frame() is not None:
            self._link.send_events(events)

    def _receive(self, message: Command | Resend | FlightRequest) -> None:
        assert self._link is not None
        if isinstance(message, Command):
            self.inbox.put(message)
        elif isinstance(message, FlightRequest):
            self._flight.answer(message)
        else:
            self._link.outbox.rewind(message.first_seq)

    def _log_orphaned(self) -> None:
        text = f"the supervisor (pid {self._supervisor_pid}) is gone: this rank stops at the next step boundary"
        if text not in self._reported:
            self._reported.add(text)
            logging.getLogger("runtime.telemetry").error(text)

    def _report_once(self, text: str) -> None:
        # A set of texts would grow with every new number in a message; the first lines of the first few are enough.
        if text in self._reported or len(self._reported) >= 20:
            return
        self._reported.add(text)
        self._events.append(self._own_record("error", text))

    def _own_record(self, level: LevelName, text: str) -> LogRecord:
        return LogRecord(rank=self.rank, level=level, logger="runtime.telemetry", text=text, wall_s=time.time())

    def _supervisor_gone(self) -> None:
        # Runs in the watch, which must not get stuck: logging, whose locks others hold, is left to the publisher.
        self.inbox.mark_orphaned()
        self._wake()


joining = threading.RLock()
"""Held while a thread of this process joins the run: the one of `zerotop run` may do so while the script does."""
_joined: set[int] = set()


def has_joined() -> bool:
    """Whether this process has asked for telemetry of a run before."""
    return bool(_joined)


_adoptable: dict[int, Telemetry] = {}


def _number(variable: str, default: Any) -> Any:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise TelemetryError(f"{variable}: expected a whole number, got {text!r}")
    return int(text)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
