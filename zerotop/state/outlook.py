"""What will happen next in a run, and after how many steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import pairwise

from zerotop.state.progress import Progress
from zerotop.state.run import RunState
from zerotop.state.settings import known_values


@dataclass(frozen=True)
class Coming:
    """`steps` until it happens, None if only its time is known; `seconds` where that can be computed."""

    what: str
    step: int | None
    steps: int | None
    seconds: float | None

    @property
    def text(self) -> str:
        """checkpoint in 34 steps."""
        if self.steps is None:
            return self.what
        return f"{self.what} in {self.steps:,} step{'s' if self.steps != 1 else ''}"


def coming(state: RunState, done: Progress) -> list[Coming]:
    """What comes by itself, the soonest first. `done` is the progress of a run that takes steps."""
    last = state.hello.steps if state.hello is not None else None

    def at(what: str, step: int | None) -> Coming | None:
        if step is None or step <= done.step:
            return None
        step = step if last is None else min(step, last)
        steps = step - done.step
        return Coming(what, step, steps, steps * done.step_ms / 1000 if done.step_ms is not None else None)

    found = [at("checkpoint", _checkpoint(state)), at("evaluation", _evaluation(state)), at("end", last)]
    return sorted((one for one in found if one is not None), key=lambda one: (one.steps or 0, one.what))


def next_boundary(state: RunState) -> int:
    """The step at whose end a command that is given now will be applied, if it arrives in time."""
    return state.step + 1


def _checkpoint(state: RunState) -> int | None:
    interval = known_values(state).get("checkpoint_interval") or 0
    return (state.step // interval + 1) * interval if isinstance(interval, int) and interval > 0 else None


def _evaluation(state: RunState) -> int | None:
    """Evaluations come at regular steps; the distance is that of the last ones, for no message has it."""
    steps = [one.step for one in state.evaluations][-6:]
    if len(steps) < 2:
        return None
    apart = int(statistics.median(b - a for a, b in pairwise(steps)))
    if apart <= 0:
        return None
    return steps[-1] + apart * max(1, -(-(state.step + 1 - steps[-1]) // apart))
