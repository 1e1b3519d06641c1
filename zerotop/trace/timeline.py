"""Writes the timeline of a run into a trace: per rank its steps, phases and collectives, and the events of the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from runtime.wire.messages import CheckpointSaved, CommandRecord, Event, Hello
from zerotop.trace.clocks import Clocks
from zerotop.trace.recorded import Collective, Phase, RecordedTimeline, Window
from zerotop.trace.writer import RUN_PID, TraceWriter, rank_pid

STEPS, PHASES, FIRST_GROUP = 1, 2, 3
"""Tracks of a rank; collectives have one per process group."""
ALIGNED_WITH = 2000
"""Newest collectives whose ends align the clocks of two nodes."""


def clocks_of(timeline: RecordedTimeline, window: Window) -> Clocks:
    """The clocks of all nodes, aligned by the collectives in the window."""
    clocks = Clocks(timeline.hellos)
    others = clocks.unaligned
    if others:
        reference = _ends(timeline, clocks.rank_on(clocks.reference), window)
        for boot_id in others:
            clocks.align(boot_id, reference, _ends(timeline, clocks.rank_on(boot_id), window))
    return clocks


def _ends(timeline: RecordedTimeline, rank: int | None, window: Window) -> dict[tuple[int, int], int]:
    if rank is None:
        return {}
    _, collectives = timeline.read(rank, window)
    world = [one for one in collectives if one.group == "world"][-ALIGNED_WITH:]
    return {(one.attempt, one.seq): one.end_ns for one in world}


class TimelineTracks:
    """Writes the tracks of ranks. Times in the trace count from `origin_ns`, wall time of the reference node."""

    def __init__(self, writer: TraceWriter, clocks: Clocks, origin_ns: int) -> None:
        self._writer, self._clocks, self._origin_ns = writer, clocks, origin_ns
        self.first_step: int | None = None
        self.last_step: int | None = None

    def rank(self, rank: int, hello: Hello | None, phases: Sequence[Phase], collectives: Sequence[Collective]) -> None:
        """Write everything of one rank."""
        writer, pid = self._writer, rank_pid(rank)
        where = f" · {hello.device} · {hello.host}" if hello is not None else ""
        writer.process(pid, f"rank {rank}{where}", rank + 1)
        writer.track(pid, STEPS, "steps", STEPS)
        writer.track(pid, PHASES, "phases", PHASES)
        self._steps(rank, phases)
        self._phases(rank, phases)
        for index, group in enumerate(dict.fromkeys(one.group for one in collectives)):
            tid = FIRST_GROUP + index
            writer.track(pid, tid, "collectives" if group == "world" else f"collectives of {group}", tid)
            self._collectives(rank, tid, [one for one in collectives if one.group == group])

    def _at(self, attempt: int, rank: int, mono_ns: int) -> int | None:
        wall_ns = self._clocks.wall_ns(attempt, rank, mono_ns)
        return None if wall_ns is None else max(0, wall_ns - self._origin_ns)

    def _steps(self, rank: int, phases: Sequence[Phase]) -> None:
        """A slice per step: from its first phase to its last one, as far as they follow each other."""
        runs: list[list[Phase]] = []
        for phase in phases:
            last = runs[-1][-1] if runs else None
            if last is not None and (last.attempt, last.step) == (phase.attempt, phase.step):
                runs[-1].append(phase)
            else:
                runs.append([phase])
        for run in runs:
            first, last = run[0], run[-1]
            start, end = self._at(first.attempt, rank, first.start_ns), self._at(last.attempt, rank, last.end_ns)
            if start is None or end is None:
                continue
            name = f"step {first.step}"
            self._writer.slice(rank_pid(rank), STEPS, name, start, end, "step", attempt=first.attempt)
            self.first_step = first.step if self.first_step is None else min(self.first_step, first.step)
            self.last_step = first.step if self.last_step is None else max(self.last_step, first.step)

    def _phases(self, rank: int, phases: Sequence[Phase]) -> None:
        for one in phases:
            start, end = self._at(one.attempt, rank, one.start_ns), self._at(one.attempt, rank, one.end_ns)
            if start is not None and end is not None:
                arguments = {"step": one.step} | ({"micro_step": one.micro_step} if one.micro_step else {})
                self._writer.slice(rank_pid(rank), PHASES, one.name, start, end, "phase", **arguments)

    def _collectives(self, rank: int, tid: int, collectives: Sequence[Collective]) -> None:
        """From the later of its issue and the end of the one before; "waited_ms" is for how long the training thread
        was blocked."""
        for one in collectives:
            start = self._at(one.attempt, rank, one.end_ns - one.duration_us * 1000)
            end = self._at(one.attempt, rank, one.end_ns)
            if start is None or end is None:
                continue
            arguments: dict[str, Any] = {"number": one.seq, "bytes": one.nbytes, "step": one.step}
            arguments |= {"waited_ms": one.wait_us / 1000, "queued_ms": _queued_ms(one)}
            self._writer.slice(rank_pid(rank), tid, one.op, start, end, "collective", **arguments)

    def marks(self, marks: Iterable[Event | CheckpointSaved | CommandRecord]) -> None:
        """Write events, checkpoints and applied commands as marks on the run's own track."""
        self._writer.process(RUN_PID, "the run", 0)
        self._writer.track(RUN_PID, 1, "events", 1)
        for mark in marks:
            wall_s, name, more = _mark(mark)
            if name:
                at_ns = max(0, round(wall_s * 1e9) - self._origin_ns)
                self._writer.instant(RUN_PID, 1, name, at_ns, **more)


def _queued_ms(one: Collective) -> float:
    """From the issue to the start."""
    return max(0, one.end_ns - one.duration_us * 1000 - one.issue_ns) / 1e6


def _mark(mark: Event | CheckpointSaved | CommandRecord) -> tuple[float, str, dict[str, Any]]:
    """(wall time, name, arguments); no name: it is not shown."""
    match mark:
        case Event():
            return mark.wall_s, mark.what, {"text": mark.text, "rank": mark.rank, "step": mark.step}
        case CheckpointSaved():
            return mark.wall_s, "checkpoint saved", {"step": mark.step, "seconds": mark.seconds}
        case CommandRecord() if mark.ack.state == "applied":
            command = mark.command
            return mark.ack.wall_s, command.name, {"number": command.number, "who": command.who, "step": mark.ack.step}
        case _:
            return 0.0, "", {}
