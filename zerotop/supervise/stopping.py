"""A stop in progress: what holds it up and, for the signal of a batch system, the deadline after which the run is
aborted."""

from __future__ import annotations

import asyncio
import math
import time
import traceback
from collections.abc import Callable, Mapping

from runtime.wire.messages import Command
from zerotop.diagnose.stacks import RankStacks
from zerotop.diagnose.stacks_report import StackTaker, blame
from zerotop.format import duration_text
from zerotop.hub.hub import Hub
from zerotop.state.run import RunState
from zerotop.state.stall import explain, idle_s, is_compiling, is_quiet, place_text, ranks_text

SLOW_S = 10.0
"""After this time the status says what holds up the stop."""
LOOK_S = 4.0
"""The longest time that taking the stacks at the deadline may need."""
_STANDS_S = 2.0
"""A rank without progress for this long counts as stalled."""


class StopWatch:
    """Follows a stop to its end: the status says what holds up a slow one, and one with a deadline becomes an abort.
    Of several deadlines the earliest holds."""

    def __init__(self, hub: Hub, taker: StackTaker, abort: Callable[[str], None]) -> None:
        self._hub = hub
        self._taker = taker
        self._abort = abort
        self._ends_s = math.inf
        self._limit_s = math.inf
        self._who = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def has_deadline(self) -> bool:
        """Whether a stop with a deadline is in progress."""
        return self._ends_s < math.inf

    def begin(self, command: Command) -> None:
        """Follow `command`, a stop that the hub has accepted. Without a deadline it may take as long as it needs."""
        limit_s = float(command.arguments.get("deadline_s", math.inf))
        ends_s = time.monotonic() + limit_s
        if limit_s < math.inf:
            words = f"{command.who}: the run stops after a checkpoint, or is aborted in {duration_text(limit_s)}"
            self._hub.event("signal", words, "warning")
        if ends_s < self._ends_s:
            self._ends_s, self._limit_s, self._who = ends_s, limit_s, command.who
        self.close()
        self._task = asyncio.get_running_loop().create_task(self._follow(self._hub.status.reason))

    async def _follow(self, asked: str) -> None:
        told = asked
        while (left_s := self._ends_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left_s, SLOW_S))
            if self._hub.status.state != "stopping" or self._hub.status.reason != told:
                continue  # it has another reason by now
            if left_s > SLOW_S and (text := f"{asked}; {hindrance(self._hub.state, {})}") != told:
                told = text
                self._hub.set_status(reason=told)
        self._abort(
            f"the run did not stop within {duration_text(self._limit_s)} of {self._who}: {await self._examined()}"
        )

    async def _examined(self) -> str:
        stands_s = min(_STANDS_S, self._limit_s / 2)
        verdict = hindrance(self._hub.state, {}, stands_s)
        try:
            async with asyncio.timeout(LOOK_S):
                ranks = await self._taker.look()
                verdict = hindrance(self._hub.state, ranks, stands_s)
                report = await self._taker.report(ranks, f"the run does not stop: {verdict}")
                return f"{verdict}; stacks: {report.path}" if report.path else verdict
        except Exception:  # the abort comes, whatever a look at the processes meets
            traceback.print_exc()
        return verdict

    def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            self._task = None


def hindrance(state: RunState, ranks: Mapping[int, RankStacks], stands_s: float = _STANDS_S) -> str:
    """Why a run that was asked to stop still runs, and which rank holds it up, in one line. `ranks` are the stacks
    of their processes; a rank without progress for `stands_s` counts as stalled."""
    there = {number: rank for number, rank in sorted(state.ranks.items()) if rank.goodbye is None}
    beats = {number: rank.heartbeat for number, rank in there.items() if rank.heartbeat is not None}
    if not beats:
        return (
            "no rank has reported its position" if there or not state.ranks else "the ranks have ended their training"
        )
    saving = tuple(number for number, beat in beats.items() if beat.phase == "checkpoint")
    if saving:
        return f"{ranks_text(saving)} still {'writes' if len(saving) == 1 else 'write'} the checkpoint"
    idle = min(idle_s(there[number], state.hub_now_ns) for number in beats)
    if idle >= stands_s and not any(is_quiet(there[number]) for number in beats):
        stall = explain(state, idle, stands_s)
        if stall is not None:
            return blame(stall, ranks, state)
    if compiling := tuple(number for number in beats if is_compiling(there[number])):
        return f"no step boundary was reached; torch.compile compiles on {ranks_text(compiling)}"
    slowest = min(beats, key=lambda number: (beats[number].step, beats[number].micro_step))
    beat = beats[slowest]
    return f"no step boundary was reached; rank {slowest} is in {place_text(beat)} of step {beat.step}"
