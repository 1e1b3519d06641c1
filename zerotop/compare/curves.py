"""What a comparison needs of a run, read from its recording. Works while the run goes on."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runtime.wire.messages import StepResult
from zerotop.output import CommandError
from zerotop.recording.playback import Playback
from zerotop.rundir.directory import RunEntry

Axis = Literal["step", "time", "tokens"]
AXES: tuple[Axis, ...] = ("step", "time", "tokens")


@dataclass(frozen=True)
class Point:
    """One step. time_s: seconds of training up to here, without the time between two attempts; tokens: up to here,
    None where a step's tokens are not known; tokens_per_s: of the whole run."""

    step: int
    time_s: float
    tokens: float | None
    loss: float | None
    grad_norm: float | None
    lr: float
    step_ms: float
    tokens_per_s: float | None

    def at(self, axis: Axis) -> float | None:
        """Its place on an axis."""
        return {"step": float(self.step), "time": self.time_s, "tokens": self.tokens}[axis]


@dataclass(frozen=True)
class RunCurves:
    """A run as far as it is recorded. evaluations: step -> loss; peak_bytes: the largest peak of a rank, on the device
    where there is one, else of its process (`peak_of` says which); branch_step: the step at which it left the run
    `branch_of`."""

    name: str
    state: str
    world_size: int
    points: tuple[Point, ...]
    evaluations: dict[int, float]
    peak_bytes: int | None
    peak_of: Literal["device", "process"]
    branch_of: str | None = None
    branch_step: int | None = None


def read_curves(entry: RunEntry) -> RunCurves:
    """Read the recording of a run. Raises CommandError for a run without one."""
    try:
        with Playback(entry.path) as playback:
            steps = [(row.wall_s, row.attempt, one) for row, one in playback.curve("step")]
            evaluated = [(one.step, one.loss) for _, one in playback.curve("evaluation")]
            state = playback.state_at(playback.frames.count - 1)
    except FileNotFoundError:
        raise CommandError(f"{entry.name} has no recording to compare") from None
    except sqlite3.Error as error:
        raise CommandError(f"can't read the recording of {entry.name}: {error}") from None
    hello = state.hello
    tokens_per_step = hello.global_batch * hello.seq_len if hello is not None and hello.seq_len else None
    world_size = state.world_size or entry.run.nproc
    memories = [rank.memory for rank in state.ranks.values() if rank.memory is not None]
    on_device = any(memory.device_total_bytes is not None for memory in memories)
    peaks = [
        max(0 if on_device else memory.rss_bytes, max(memory.peak_bytes.values(), default=0)) for memory in memories
    ]
    branch = entry.run.branch_of
    return RunCurves(
        name=entry.name,
        state=entry.status.state,
        world_size=world_size,
        points=tuple(points_of(steps, world_size, tokens_per_step)),
        evaluations={step: loss for step, loss in evaluated if loss is not None},
        peak_bytes=max(peaks, default=0) or None,
        peak_of="device" if on_device else "process",
        branch_of=branch.run if branch is not None else None,
        branch_step=branch.step if branch is not None else None,
    )


def points_of(
    steps: Sequence[tuple[float, int, StepResult]], world_size: int, tokens_per_step: int | None
) -> list[Point]:
    """The points of (wall_s, attempt, step) rows, oldest first. A step that was replayed after a restart counts once,
    as it was taken last; the time up to it is that of training, without the time between attempts."""
    points: list[Point] = []
    before: tuple[float, int] | None = None
    time_s = 0.0
    for wall_s, attempt, one in steps:
        own_s = one.step_ms / 1000
        time_s += max(0.0, wall_s - before[0]) if before is not None and before[1] == attempt else own_s
        before = wall_s, attempt
        while points and points[-1].step >= one.step:
            points.pop()
        tokens = None
        if tokens_per_step is not None:
            tokens = float(one.step * tokens_per_step)
        rate = one.tokens_per_s * world_size if one.tokens_per_s is not None else None
        points.append(Point(one.step, time_s, tokens, one.loss, one.grad_norm, one.lr, one.step_ms, rate))
    return points
