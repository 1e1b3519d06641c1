"""Telemetry of one rank: the training thread appends, a thread of its own sends, and commands come back the same way.

The training thread never waits for the hub, nor touches a socket. The publisher thread owns both sockets:

- PUB, one packet per tick: phases, collectives, step results, memory, always a heartbeat. Dropped when nobody reads.
- DEALER, events in numbered packets that the hub may ask for again; downwards, commands.
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
from runtime.telemetry.handler import LevelName, TelemetryHandler
from runtime.telemetry.inbox import Inbox
from runtime.telemetry.link import Link
from runtime.telemetry.null import NullTelemetry, Outcome, Severity
from runtime.telemetry.orphan import SupervisorWatch, grace_s
from runtime.telemetry.recorder import Recorder
from runtime.wire.messages import (
    Ack,
    CheckpointSaved,
    Collectives,
    Command,
    Event,
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
"""Log records wait in line with the events; past this many they are dropped: a flood can't push events out."""
MEMORY_INTERVAL_S = 1.0
MEMORY_INTERVAL_CHANGED_S = 0.1
LONGEST_SLEEP_S = 0.25
"""Log records don't wake the publisher; this bounds how long one waits at a low telemetry rate."""


class TelemetryError(Exception):
    """The run's environment does not fit together; the message says what was expected and what came."""


class Telemetry(Recorder):
    """One per rank and process. `enter`, `span`, `issued`, `completed`, `step`: see `Recorder`."""

    def __init__(self, rank: int, attempt: int, sockets: Sockets, supervisor_pid: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.attempt = attempt
        self.inbox = Inbox()
        self.memory_source: Callable[[], Memory] | None = None
        self.log_handler = TelemetryHandler(self.log)
        self._logger = logging.getLogger("runtime")
        self._sockets = sockets
        self._supervisor_pid = supervisor_pid
        self._watch: SupervisorWatch | None = None
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="zerotop-telemetry", daemon=True)
        self._events: deque[Any] = deque(maxlen=EVENTS_KEPT)
        self._logs_dropped = 0
        self._hz = 5.0
        self._micro_steps = 1
        self._memory_due = False
        self._memory_at = -math.inf
        self._said_goodbye = False
        self._owner = Owner()
        self._at_exit: Callable[[], Any] | None = None
        self._close_by: float | None = None
        self._told: set[str] = set()

    @classmethod
    def from_environment(cls, rank: int) -> Telemetry | NullTelemetry:
        """Telemetry of the run that ZEROTOP_RUN names, or one that does nothing. Raises TelemetryError."""
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
        attempt = _number(ATTEMPT_VARIABLE, run.attempt)
        return cls(rank, attempt, Sockets(run.sockets), _number(SUPERVISOR_VARIABLE, None))

    # ---- life ------------------------------------------------------------------------------------------------------
    def start(self, hello: Hello) -> None:
        """Open the sockets, start the threads, say hello, and send log records from here on. Raises TelemetryError."""
        if self._link is not None:
            raise RuntimeError("telemetry was started already")
        try:
            seconds = grace_s()
            self._link = Link(self._sockets, self.rank, self.attempt, self._tell_once)
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

    def goodbye(
        self, outcome: Outcome, step: int, error: str = "", fatal: bool = False, culprit: int | None = None
    ) -> None:
        """The last word, before `close`. Only the first one counts: what goes wrong on the way out is not the cause.
        A forked child has none.

        `fatal`: another attempt would end the same way, so the supervisor does not start one. `culprit`: the rank whose
        doing it is, where that is known.
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
        """Send what is left, for at most timeout_s seconds, and end the threads. Idempotent; also runs at exit. In a
        forked child nothing happens: threads and sockets are the rank's.

        When the supervisor is gone the grace timer goes on: a process that hangs on leaving must not outlive the run.
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
        """Telemetry packets per second; a change acts from the next tick on and is told to the hub as an event."""
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
        """A line for the event pane; `what` is a stable word. `data` must be JSON. of_run: it is a matter of the whole
        run, not of this rank."""
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

    def log(self, level: LevelName, text: str, logger: str = "runtime", wall_s: float | None = None) -> None:
        """One log record; `log_handler` calls this (on the root logger if that is set up, else on `runtime`)."""
        if len(self._events) >= LOGS_KEPT:
            self._logs_dropped += 1
            return
        wall_s, text = wall_s or time.time(), shortened(text, ERROR_KEPT)
        self._events.append(LogRecord(rank=self.rank, level=level, logger=logger, text=text, wall_s=wall_s))

    def ack(self, ack: Ack) -> None:
        """The answer to a command; rank and wall_s are filled in."""
        reason = shortened(ack.reason, ERROR_KEPT)
        changes = {"rank": self.rank, "reason": reason, "wall_s": ack.wall_s or time.time()}
        self._send_event(ack.model_copy(update=changes))

    def memory_changed(self) -> None:
        """Ask for a Memory message soon (within 0.1 s) instead of at the next full second."""
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
                    # Late ticks are not made up for: a burst of packets says nothing that the newest does not.
                    next_tick = max(next_tick + 1 / self._hz, now)
                    self._link.publish(self._tick(now))
            except Exception:
                self._tell_once(f"telemetry failed: {traceback.format_exc()}")
                time.sleep(1 / self._hz)
        self._finish()

    def _finish(self) -> None:
        assert self._link is not None and self._close_by is not None
        try:
            # Without memory: its source may be half taken down by now.
            self._link.publish(self._measured())
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
                self._tell_once(f"memory can't be measured: {type(error).__name__}: {error}")
        return messages

    def _measured(self) -> list[Any]:
        """What the training thread recorded since the last tick, and a heartbeat."""
        # model_construct: our own figures need no validation, and this runs ten times a second beside the training.
        drained = self.drain()
        messages: list[Any] = []
        if drained.spans:
            spans = drained.spans[-SPANS_PER_PACKET:]
            messages.append(Phases.model_construct(rank=self.rank, micro_steps=self._micro_steps, spans=spans))
        by_step: dict[int, list[Any]] = {}
        for step, record in drained.collectives:
            by_step.setdefault(step, []).append(record)
        for step, records in by_step.items():
            messages.append(Collectives.model_construct(rank=self.rank, step=step, records=records))
        messages += drained.steps
        at = self.position()
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
                progress_ns=at.progress_ns,
                dropped=drained.dropped,
                now_ns=time.monotonic_ns(),
            )
        )
        return messages

    def _send_events(self) -> None:
        assert self._link is not None
        events = [self._events.popleft() for _ in range(len(self._events))]
        if self._logs_dropped and len(self._events) < LOGS_KEPT:
            dropped, self._logs_dropped = self._logs_dropped, 0
            text = f"{dropped} log records came too fast and were not sent: see the rank's log file"
            events.append(self._own_record("warning", text))
        if events or self._link.outbox.next_frame() is not None:
            self._link.send_events(events)

    def _receive(self, message: Command | Resend) -> None:
        assert self._link is not None
        if isinstance(message, Command):
            self.inbox.put(message)
        else:
            self._link.outbox.rewind(message.first_seq)

    def _log_orphaned(self) -> None:
        text = f"the supervisor (pid {self._supervisor_pid}) is gone: this rank stops at the next step boundary"
        if text not in self._told:
            self._told.add(text)
            logging.getLogger("runtime.telemetry").error(text)

    def _tell_once(self, text: str) -> None:
        # A set of texts would grow with every new number in a message; the first lines of the first few are enough.
        if text in self._told or len(self._told) >= 20:
            return
        self._told.add(text)
        self._events.append(self._own_record("error", text))

    def _own_record(self, level: LevelName, text: str) -> LogRecord:
        return LogRecord(rank=self.rank, level=level, logger="runtime.telemetry", text=text, wall_s=time.time())

    def _supervisor_gone(self) -> None:
        # Runs in the watch, which must not get stuck: logging, whose locks others hold, is left to the publisher.
        self.inbox.mark_orphaned()
        self._wake()


def _number(variable: str, default: Any) -> Any:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isdecimal():
        raise TelemetryError(f"{variable}: expected a whole number, got {text!r}")
    return int(text)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
