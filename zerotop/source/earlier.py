"""Earlier runs of the same model on this machine, to compare the loss of a run with."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

from runtime.wire.codec import ProtocolError, decode_up
from runtime.wire.messages import Hello, StepResult
from zerotop.hub.timeline import open_recording
from zerotop.rundir.directory import RunEntry, list_runs
from zerotop.state.losstrend import EarlierRun

RUNS_SHOWN = 3
LOOKED_AT = 40
"""The newest runs of which the model is looked up."""
POINTS = 400
_STEPS = "SELECT body FROM messages WHERE kind = 'step' AND source = 'rank/0' ORDER BY id"
_HELLO = "SELECT body FROM messages WHERE kind = 'hello' ORDER BY id LIMIT 1"


def earlier_finder(entry: RunEntry) -> Callable[[Hello], tuple[EarlierRun, ...]]:
    """A function that finds runs before `entry` with the model of a hello. It reads recordings: call it in a thread."""
    return partial(earlier_runs, entry)


def earlier_runs(entry: RunEntry, own: Hello) -> tuple[EarlierRun, ...]:
    """The newest RUNS_SHOWN other runs that trained a model of the same name and size, the newest first. Recordings
    that cannot be read are left out: a comparison is no reason to fail."""
    if not own.parameters:
        return ()
    began = entry.status.started_wall_s or entry.run.created_wall_s
    found = []
    for other in list_runs()[:LOOKED_AT]:
        if other.name == entry.name or (other.status.started_wall_s or other.run.created_wall_s) > began:
            continue
        hello = _hello(other)
        if hello is None or (hello.model_name, hello.parameters) != (own.model_name, own.parameters):
            continue
        points = tuple(_losses(other))
        if points:
            found.append(EarlierRun(other.name, points))
        if len(found) == RUNS_SHOWN:
            break
    return tuple(found)


def _hello(entry: RunEntry) -> Hello | None:
    for body in _bodies(entry, _HELLO):
        message = _decoded(body)
        return message if isinstance(message, Hello) else None
    return None


def _losses(entry: RunEntry) -> Iterator[tuple[float, float]]:
    """(step, loss) by rising step, at most about POINTS of them; replayed steps count once."""
    bodies = list(_bodies(entry, _STEPS))
    stride = max(1, len(bodies) // POINTS)
    by_step: dict[int, float] = {}
    for body in bodies[::-stride][::-1]:
        message = _decoded(body)
        if isinstance(message, StepResult) and message.loss is not None and math.isfinite(message.loss):
            by_step[message.step] = message.loss  # of a replayed step, the last one counts
    yield from sorted((float(step), loss) for step, loss in by_step.items())


def _bodies(entry: RunEntry, query: str) -> Iterator[bytes]:
    try:
        with closing(open_recording(entry.path)) as database:
            for (body,) in database.execute(query):
                yield body
    except (sqlite3.Error, OSError):
        return


def _decoded(body: bytes) -> object:
    try:
        return decode_up(body)
    except ProtocolError:
        return None
