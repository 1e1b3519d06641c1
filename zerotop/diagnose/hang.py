"""Hangs: a running run in which no rank makes progress. Checked once a second on what the hub knows, reported with the
stacks of all ranks and, if the config says so, ended and restarted.

No rank's clock is read. What counts is whether anything in the heartbeats changed between two checks on the
supervisor's own clock: a stopped rank sends nothing, and the ranks that wait for it send the same values again and
again.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zerotop.diagnose.outcome import early_end_reason
from zerotop.diagnose.stacks_report import StackTaker, blame
from zerotop.format import duration_text
from zerotop.hub.hub import Hub
from zerotop.state.condition import silent_ranks
from zerotop.state.run import RunState
from zerotop.state.stall import counts_steps, explain, is_past, is_quiet, ranks_text

HANG_VARIABLE = "ZEROTOP_HANG_S"
HANG_S = 60.0
HANG_STEPS = 10
"""A run hangs after max(HANG_S, HANG_STEPS x the median step time of this attempt) without progress."""
FIRST_STEPS = 2
"""The first steps of an attempt are never a hang: they compile, warm up and allocate."""
JUMP_S = 5.0
"""A longer gap between two checks means that the supervisor or the machine was suspended: the count starts again."""
LOOK_S = 1.0

Marks = dict[int, tuple[Any, ...]]


@dataclass(frozen=True)
class Progress:
    """`still_s`: seconds without progress, None while the run may rightly stand still. `moved`: there was progress
    since the last check."""

    still_s: float | None
    moved: bool


class Stillness:
    """Measures for how long the ranks have made no progress, from repeated checks of the state."""

    def __init__(self) -> None:
        self._marks: Marks | None = None
        self._since_s = 0.0
        self._looked_s = 0.0

    def look(self, state: RunState, now_s: float) -> Progress:
        """Check once. `now_s` is a monotonic clock of this process."""
        marks = _marks(state)
        moved = self._marks is not None and marks != self._marks
        jumped = now_s - self._looked_s > JUMP_S
        if self._marks is None or moved or jumped or not should_move(state):
            self._since_s = now_s
        self._marks, self._looked_s = marks, now_s
        return Progress(now_s - self._since_s if should_move(state) else None, moved)

    def restart(self, now_s: float) -> None:
        """Start counting again from `now_s`."""
        self._since_s = self._looked_s = now_s


def should_move(state: RunState) -> bool:
    """Whether no progress would be a hang: the run is running and past its first steps, and no rank has a reason to
    hold up the others. A rank that sends nothing has no such reason, whatever phase the others are in."""
    ranks = [rank for rank in state.ranks.values() if rank.goodbye is None]
    beats = [rank.heartbeat for rank in ranks if rank.heartbeat is not None]
    if state.state_name != "running" or not beats:
        return False
    if not is_past(state, FIRST_STEPS):
        return False
    if not counts_steps(state) and not any(beat.entered_seq > beat.completed_seq for beat in beats):
        return False  # a script that is outside any collective may do what it likes
    return not any(is_quiet(rank) for rank in ranks) or bool(silent_ranks(state))


def limit_s(state: RunState) -> float:
    """Seconds without progress after which the run hangs."""
    start = state.hello.start_step if state.hello else 0
    taken = [result.step_ms for result in state.series if result.step > start]
    return max(least_s(), HANG_STEPS * statistics.median(taken) / 1000 if taken else 0.0)


def least_s() -> float:
    """HANG_S, unless the environment variable sets another limit."""
    try:
        return max(0.0, float(os.environ[HANG_VARIABLE]))
    except (KeyError, ValueError):
        return HANG_S


def _marks(state: RunState) -> Marks:
    """Rank -> everything that changes when the rank makes progress."""
    marks: Marks = {}
    for rank, known in state.ranks.items():
        beat, pid = known.heartbeat, known.hello.pid if known.hello else None
        place = (
            (beat.phase, beat.step, beat.micro_step, beat.entered_seq, beat.completed_seq, beat.progress_ns)
            if beat
            else ()
        )
        marks[rank] = (pid, known.goodbye is not None, known.step.step if known.step else 0, *place)
    return marks


class HangWatch:
    """Reports hangs: an event with the verdict, the stacks in a file, and the status's reason while the hang lasts.
    `end_attempt(reason)`, if given, is called for each hang; `end_early(reason)` for one that can't end, because a rank
    has finished while the others wait for it in a collective."""

    def __init__(
        self,
        hub: Hub,
        taker: StackTaker,
        end_attempt: Callable[[str], None] | None,
        end_early: Callable[[str], None] | None = None,
    ) -> None:
        self._hub = hub
        self._taker = taker
        self._end_attempt = end_attempt
        self._end_early = end_early
        self._stillness = Stillness()
        self._hang: str | None = None
        self._hung_s = 0.0
        self._attempt = 0
        self._said_compiling = False

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look(time.monotonic())

    async def look(self, now_s: float) -> None:
        """Check once."""
        state = self._hub.state
        look = self._stillness.look(state, now_s)
        if look.moved:
            self._said_compiling = False
        if self._hang is not None:
            if look.moved or look.still_s is None:
                self._clear(now_s)
            return
        limit = limit_s(state)
        if look.still_s is None or look.still_s < limit:
            return
        await self._examine(look.still_s, limit)

    async def _examine(self, still_s: float, limit: float) -> None:
        """No progress for too long: look at the processes before calling it a hang."""
        state, before = self._hub.state, _marks(self._hub.state)
        ranks = await self._taker.look()
        now_s = time.monotonic()
        if _marks(state) != before or not should_move(state):
            return
        compiling = tuple(rank for rank, found in sorted(ranks.items()) if found.compiling)
        if compiling:
            self._stillness.restart(now_s)
            if not self._said_compiling:
                self._said_compiling = True
                does = "compiles" if len(compiling) == 1 else "compile"
                self._hub.event(
                    "compiling",
                    f"no progress for {duration_text(still_s)}, but not a hang: {ranks_text(compiling)} {does}",
                )
            return
        stall = explain(state, still_s, limit)
        verdict = blame(stall, ranks, state) if stall is not None else "no rank has reported its position"
        report = await self._taker.report(ranks, f"no progress for {duration_text(still_s)}: {verdict}", evidence=True)
        line = "; ".join([verdict, *report.findings[:1]]) + (f"; stacks: {report.path}" if report.path else "")
        self._hang, self._hung_s, self._attempt = f"hang: {line}", now_s - still_s, self._hub.status.attempt
        self._hub.event(
            "hang",
            line,
            "error",
            idle_s=round(still_s, 1),
            stacks=report.path,
            evidence=report.evidence,
            attempt=self._attempt,
            flight=[found.document() for found in report.collected.flight],
        )
        self._hub.set_status(reason=self._hang)
        await self._taker.deepen(report)
        if _marks(state) != before or not should_move(state):
            return  # it moves again, or was stopped, meanwhile
        if stall is not None and stall.ended and self._end_early is not None:
            goodbye = state.ranks[stall.ended[0]].goodbye
            self._end_early(early_end_reason(stall.ended, goodbye.step if goodbye else 0, goodbye))
        elif self._end_attempt is not None:
            self._end_attempt(f"no progress for {duration_text(still_s)}: {line}")

    def _clear(self, now_s: float) -> None:
        """There is progress again; or the run is being stopped, aborted or restarted, which sets a reason of its
        own."""
        hang, self._hang = self._hang, None
        if self._hub.status.state == "running" and self._hub.status.attempt == self._attempt:
            lasted = duration_text(now_s - self._hung_s)
            self._hub.event(
                "hang", f"progress resumed at step {self._hub.state.step + 1}, after {lasted} without progress"
            )
        if self._hub.status.reason == hang:
            self._hub.set_status(reason="")
