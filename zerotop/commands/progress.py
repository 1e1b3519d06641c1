"""A run as plain progress lines, for pipes, logs and batch systems. Ctrl-C and the signals of a batch system stop
it."""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from runtime.wire.messages import CheckpointSaved, LogRecord, RunStatus, StepResult
from zerotop.documents import status_document
from zerotop.format import duration_text, figure_text, rate_text
from zerotop.output import print_json, say, show, with_exit_code
from zerotop.rundir.directory import RunEntry
from zerotop.source.base import Source
from zerotop.source.command_answers import new_command
from zerotop.state.evaluations import evaluation_text
from zerotop.state.events import Record, record_text
from zerotop.state.progress import progress
from zerotop.state.run import RunState
from zerotop.supervise.batchsignal import stop_by_signal

POLL_S = 0.25
OVERDUE_S = 30.0
"""Ending the ranks takes some seconds; a supervisor that needs longer is stopped or hangs itself."""
_LOUD_EVENTS = frozenset({"checkpoint", "paused", "resumed", "signal", "hang", "verdict", "alert"})
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Sent by a batch system before it ends the job."""


def follow(
    source: Source, entry: RunEntry, *, as_json: bool = False, output: Callable[[bool], None] | None = None
) -> int:
    """Print lines until the run ends; the exit code is 0 if it finished or stopped, 1 if it failed or was aborted.
    `output(at_end)` prints what a wrapped command has written; our lines then go to stderr.

    The first Ctrl-C sends stop, the second abort. SIGTERM and SIGUSR1 send stop: a batch system that ends the job kills
    everything in it once this process has exited, so it stays until the run has ended. With `as_json` the lines go to
    stderr, and at the end the state of the run goes to stdout. Closes the source.
    """
    stopping = "asked to stop" if entry.run.wrapped else "stopping after a checkpoint"
    lines = _Lines(entry, to_stderr=as_json or output is not None)
    try:
        with _signals() as count:
            interrupts, told, leave_s = 0, False, math.inf
            while True:
                source.wait(POLL_S)
                source.poll()
                if output is not None:
                    output(source.connection == "ended")
                lines.tell(source.state)
                if source.connection == "ended":
                    break
                while interrupts < min(2, count[signal.SIGINT]):
                    interrupts += 1
                    if interrupts == 1:
                        _ask(source, "stop", f"{stopping}; Ctrl-C again aborts at once", "Ctrl-C")
                    else:
                        _ask(source, "abort", "aborting", "Ctrl-C")
                come = [number for number in _STOP_SIGNALS if count[number]]
                if come and not told:
                    told = True
                    command = stop_by_signal(come[0].name)
                    limit_s = command.arguments["deadline_s"]
                    say(f"{command.who}: {stopping}, or aborting in {duration_text(limit_s)}")
                    source.send(command)
                    leave_s = time.monotonic() + limit_s + OVERDUE_S
                if time.monotonic() > leave_s:
                    say(f"the supervisor still does not answer {duration_text(OVERDUE_S)} after the deadline")
                    break
    finally:
        source.close()
    status = source.state.status or entry.status
    lines.end(status)
    if as_json:
        print_json(status_document(source.state, entry))
    return 0 if status.state in ("finished", "stopped") else 1


@contextmanager
def _signals() -> Iterator[Counter[int]]:
    """Count Ctrl-C and the signals of a batch system instead of exiting."""
    count: Counter[int] = Counter()

    def note(number: int, _: Any) -> None:
        count[number] += 1

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, *_STOP_SIGNALS)}
    try:
        yield count
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(source: Source, name: str, words: str, by: str) -> None:
    say(words)
    command = new_command(name)
    source.send(command.model_copy(update={"who": f"{command.who} ({by})"}))


class _Lines:
    """Remembers what was already printed: the state is polled, and starts again after a reconnect."""

    def __init__(self, entry: RunEntry, *, to_stderr: bool) -> None:
        self._to_stderr = to_stderr
        self._interval = _log_interval(entry)
        # A resumed run has the steps of previous attempts; they are not printed again.
        self._printed_step = entry.status.step if entry.run.attempt > 1 else 0
        self._attempt = entry.run.attempt
        self._told: set[tuple[float, str]] = set()
        self._start_wall_s = entry.status.started_wall_s or 0.0
        self._told_evaluation = self._start_wall_s if entry.run.attempt == 1 else time.time()
        """Wall time of the newest evaluation that was printed, or from which on they are."""

    def tell(self, state: RunState) -> None:
        self._tell_events(state)
        self._interval = _changed_interval(state) or self._interval
        if state.hello and state.hello.attempt > self._attempt:  # the ranks were restarted: steps are replayed
            self._attempt = state.hello.attempt
            self._printed_step = min(self._printed_step, state.hello.start_step)
        new = [point for point in state.series if point.step > self._printed_step]
        due = [point for point in new if point.step % self._interval == 0]
        # The series is thinned in long runs: print the newest step in place of a multiple that was dropped.
        if not due and new and new[-1].step // self._interval > self._printed_step // self._interval:
            due = new[-1:]
        for point in due:
            self._print(step_line(point, state, newest=point is due[-1]))
            self._printed_step = point.step
        self._tell_evaluations(state)

    def _tell_evaluations(self, state: RunState) -> None:
        """Print the evaluations that are new, each beside the best one up to it."""
        best = None
        for evaluation in state.evaluations:
            if evaluation.loss is not None and math.isfinite(evaluation.loss):
                best = evaluation if best is None or best.loss is None or evaluation.loss < best.loss else best
            if evaluation.wall_s > self._told_evaluation:
                self._told_evaluation = evaluation.wall_s
                self._print(evaluation_text(evaluation, best))

    def _tell_events(self, state: RunState) -> None:
        for event in state.events:
            text = record_text(event)
            key = (event.wall_s, text)
            if key in self._told or event.wall_s < self._start_wall_s:
                continue
            self._told.add(key)
            if _is_loud(event):
                self._print(f"rank {event.rank}: {text}" if isinstance(event, LogRecord) else text)

    def end(self, status: RunStatus) -> None:
        if status.error:
            whose = "" if status.failed_rank is None else f" of rank {status.failed_rank}"
            say(f"last lines{whose}:\n{status.error.rstrip()}")
        code = status.exit_code if status.state == "failed" else None
        reason = f", {with_exit_code(status.reason, code)}" if status.reason else ""
        line = f"{status.name}: {status.state} at step {status.step}{reason}"
        if status.state in ("failed", "aborted"):
            say(line)
        else:
            self._print(line)

    def _print(self, text: str) -> None:
        show(text, to_stderr=self._to_stderr)


def step_line(point: StepResult, state: RunState, *, newest: bool = True) -> str:
    """step 40/200  loss 2.3456  lr 3.00e-4  norm 1.2346  12.3K tokens/s  ETA 1m 05s, and after evaluations also
    eval 2.4102 (best 2.3801 at step 20)."""
    how_far = progress(state)
    of = f"/{how_far.steps}" if how_far.steps else ""
    parts = [f"step {point.step}{of}", f"loss {figure_text(point.loss)}", f"lr {figure_text(point.lr)}"]
    if point.grad_norm is not None:
        parts.append(f"norm {figure_text(point.grad_norm)}")
    if newest and how_far.tokens_per_s is not None:
        parts.append(rate_text(how_far.tokens_per_s))
    if newest and how_far.eta_s is not None:
        parts.append(f"ETA {duration_text(how_far.eta_s)}")
    if newest and (evaluated := state.evaluations.newest) is not None and evaluated.loss is not None:
        best = state.evaluations.best
        better = f" (best {figure_text(best.loss)} at step {best.step})" if best and best.step != evaluated.step else ""
        parts.append(f"eval {figure_text(evaluated.loss)}{better}")
    if point.loss_scale is not None:
        parts.append(f"scale {point.loss_scale:g}")
    if point.skipped:
        parts.append("skipped (overflow)" if point.loss_scale is not None else "skipped (not finite)")
    return "  ".join(parts)


def _is_loud(event: Record) -> bool:
    """Whether the event is printed among the progress lines."""
    if isinstance(event, CheckpointSaved):
        return True
    if isinstance(event, LogRecord):
        return not event.logger.startswith("zerotop.") and event.level in ("warning", "error", "critical")
    return event.what != "exit" and (event.severity != "info" or event.what in _LOUD_EVENTS)


def _log_interval(entry: RunEntry) -> int:
    try:
        return max(1, int(json.loads((entry.path / "resolved.json").read_text())["zerotop"]["log"]["interval"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 10


def _changed_interval(state: RunState) -> int | None:
    """The newest log_interval that a `set` has applied."""
    for record in reversed(state.commands.values()):
        if record.ack.state == "applied" and "log_interval" in record.command.arguments:
            return int(record.command.arguments["log_interval"])
    return None
