"""The stacks of all ranks as one text with the verdict at its top: saved in the run directory, and the answer to the
command `stacks`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from runtime.process.atomic_file import replace_text
from runtime.wire.messages import Command
from zerotop.diagnose.collecting import NO_NATIVE, Collected, collect, next_number, read_native
from zerotop.diagnose.frames import grouped
from zerotop.diagnose.process_state import ENDED, GONE
from zerotop.diagnose.pyspy import find_pyspy
from zerotop.diagnose.stacks import RankStacks, ask, find_ranks
from zerotop.diagnose.stacks_text import stacks_text, where_text
from zerotop.format import duration_text
from zerotop.hub.hub import Hub
from zerotop.state.run import RunState
from zerotop.state.stall import Stall, explain, idle_s, place_text, ranks_text

ANSWER_BYTES = 32 * 1024
"""Size limit of the text in the answer; the file has all of it."""
ASKED_S = 2.0
"""No progress for this long is part of the verdict when the stacks are asked for."""


@dataclass(frozen=True)
class Report:
    """The saved report. `path` is relative to the run directory; empty if the file could not be written, and `text`
    then says why."""

    ranks: Mapping[int, RankStacks]
    verdict: str
    text: str
    path: str = ""
    findings: tuple[str, ...] = ()
    """What else was found, a sentence each: by the Flight Recorders."""
    evidence: str = ""
    """The folder with what belongs to it, relative to the run directory; empty if nothing more was saved."""
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    number: int = 0
    collected: Collected = field(default_factory=Collected)

    @property
    def compiling(self) -> tuple[int, ...]:
        """Ranks whose training thread is inside a compiler."""
        return tuple(rank for rank, stacks in sorted(self.ranks.items()) if stacks.compiling)


class StackTaker:
    """Takes the stacks of the ranks of `hub`, one request at a time."""

    def __init__(self, run: Path, nproc: int, hub: Hub) -> None:
        self._run = run
        self.nproc = nproc
        self._hub = hub
        self._turn = asyncio.Lock()

    async def look(self, only: Collection[int] | None = None) -> dict[int, RankStacks]:
        """The stacks of every rank, or of those in `only`, without writing anything to the run directory."""
        pids = {rank: state.hello.pid for rank, state in self._hub.state.ranks.items() if state.hello}
        async with self._turn:
            return await asyncio.to_thread(self._look, self._logs(), pids, only)

    def _look(self, logs: Path, pids: Mapping[int, int], only: Collection[int] | None) -> dict[int, RankStacks]:
        found = find_ranks(self._run, self.nproc, pids)
        wanted = found if only is None else {rank: process for rank, process in found.items() if rank in only}
        return ask(wanted, pids, logs, reader=find_pyspy())

    async def report(self, ranks: Mapping[int, RankStacks], verdict: str, *, evidence: bool = False) -> Report:
        """Write stacks-N.txt for the result of `look`. evidence: collect also what takes some seconds, in a folder
        beside it (collecting.py)."""
        async with self._turn:
            collected, number, problem = Collected(), 0, ""
            try:
                number = await asyncio.to_thread(next_number, self._logs())
                if evidence:
                    collected = await collect(self._hub, self._logs(), number, ranks)
            except OSError as error:
                problem = error.strerror or str(error)
            report = Report(ranks, verdict, "", number=number, collected=collected)
            return await self._written(report, self._logs(), problem)

    async def survivors(self) -> Report | None:
        """A rank has died: what the others were doing, as long as they live. None if none of them answers."""
        logs = self._logs()
        try:
            ranks = await self.look()
            if self._logs() != logs or not any(found.threads for found in ranks.values()):
                return None
            dead = tuple(rank for rank, found in sorted(ranks.items()) if found.trouble in (*ENDED, GONE))
            return await self.report(ranks, f"{ranks_text(dead) or 'a rank'} has died", evidence=True)
        except (OSError, psutil.Error):  # they are being ended at this moment
            return None

    async def deepen(self, report: Report, ranks: Collection[int] | None = None) -> Report:
        """Add C frames to a report, of `ranks` or of those that tell most, for which py-spy stops their processes.
        Takes up to `pyspy.NATIVE_S`."""
        logs = self._logs()
        async with self._turn:
            read = await asyncio.to_thread(read_native, report.ranks, ranks)
            return await self._written(replace(report, ranks=read), logs)

    async def _written(self, report: Report, logs: Path, problem: str = "") -> Report:
        """The report with its text, saved."""
        status, number, collected = self._hub.status, report.number, report.collected
        folder = f"logs/{logs.name}/evidence-{number}" if collected.files else ""
        head = (f"{status.name}, attempt {logs.name}, {report.when}", report.verdict, where_text(report.ranks))
        parts = ["\n".join(line for line in (*head, *collected.findings) if line)]
        parts.append(stacks_text(report.ranks, self._hub.state))
        parts += [f"{title}:\n{section}" for title, section in collected.sections.items()]
        if collected.sections and find_pyspy() is None:
            parts.append(NO_NATIVE)
        if folder:
            parts.append(f"saved beside this: {folder}/ ({', '.join(collected.files)})")
        text, path = "\n\n".join(part.rstrip("\n") for part in parts) + "\n", ""
        if number:
            try:
                saved = await asyncio.to_thread(_save, logs, text, number)
                path = str(saved.relative_to(self._run))
            except OSError as error:
                problem = error.strerror or str(error)
        if problem:
            text = f"(not saved: {logs}: {problem})\n{text}"
        return replace(report, text=text, path=path, findings=collected.findings, evidence=folder)

    async def answer(self, command: Command) -> None:
        """Carry out the command `stacks`. Of a run that stands still, or with the argument `native`, everything is
        collected; a run that trains is not held up."""
        only, native = command.arguments.get("ranks"), bool(command.arguments.get("native"))
        if unknown := [rank for rank in only or () if rank >= self.nproc]:
            reason = f"stacks: there is no rank {unknown[0]}: the ranks are 0 to {self.nproc - 1}"
            self._hub.router.complete(command.id, reason=reason)
            return
        try:
            ranks = await self.look(only)
        except (OSError, psutil.Error) as error:
            self._hub.router.complete(command.id, reason=f"the ranks' processes can't be looked at: {error}")
            return
        still = _idle(self._hub.state) >= ASKED_S
        verdict = _verdict(self._hub.state, ranks)
        report = await self.report(ranks, verdict, evidence=still or native)
        if still or native:
            report = await self.deepen(report, only if native else None)
        result = {"path": report.path, "text": _bounded(report), "evidence": report.evidence}
        self._hub.router.complete(command.id, result=result)

    def _logs(self) -> Path:
        return self._run / "logs" / str(self._hub.status.attempt)


def blame(stall: Stall, ranks: Mapping[int, RankStacks], state: RunState) -> str:
    """The verdict in one line, with the state of the processes that it names."""

    def named(rank: int) -> str:
        found, known = ranks.get(rank), state.ranks.get(rank)
        beat = known.heartbeat if known else None
        notes = [found.trouble] if found and found.trouble else [f"in {place_text(beat)}"] if beat else []
        notes += [f"pid {found.pid}"] if found and found.pid else []
        return f"rank {rank}" + (f" ({', '.join(notes)})" if notes else "")

    if stall.missing and stall.waiting:
        few = len(stall.missing) <= 4
        who = ", ".join(named(rank) for rank in stall.missing) if few else ranks_text(stall.missing)
        have = "has" if len(stall.missing) == 1 else "have"
        wait = "waits" if len(stall.waiting) == 1 else "wait"
        text = f"{who} {have} not entered {stall.op or 'collective'} {stall.seq}; {ranks_text(stall.waiting)} {wait} "
        text += "for it" if len(stall.missing) == 1 else "for them"
        told = set(stall.missing) if few else set()
    else:
        text, told = stall.cause, set()
    for trouble, others in grouped(
        (found.trouble, rank) for rank, found in sorted(ranks.items()) if found.trouble and rank not in told
    ).items():
        pids = ", ".join(str(ranks[rank].pid) for rank in others[:4] if ranks[rank].pid)
        text += f"; {ranks_text(others)}: {trouble}" + (f" (pid {pids})" if pids else "")
    return text


def _idle(state: RunState) -> float:
    """For how many seconds no rank has made progress, as far as their heartbeats tell."""
    beating = [rank for rank in state.ranks.values() if rank.goodbye is None and rank.heartbeat is not None]
    return min((idle_s(rank, state.hub_now_ns) for rank in beating), default=0.0)


def _verdict(state: RunState, ranks: Mapping[int, RankStacks]) -> str:
    """The verdict for an explicit request, which reports a stall earlier than the automatic check."""
    idle = _idle(state)
    stall = explain(state, idle, ASKED_S) if idle >= ASKED_S and state.state_name in ("running", "stopping") else None
    if stall is None:
        return blame(Stall(0.0, f"{state.state_name} at step {state.step}"), ranks, state)
    return f"no progress for {duration_text(idle)}: {blame(stall, ranks, state)}"


def _save(logs: Path, text: str, number: int) -> Path:
    """Write stacks-`number`.txt, or replace it. Raises OSError."""
    path = logs / f"stacks-{number}.txt"
    replace_text(path, text)
    return path


def _bounded(report: Report) -> str:
    whole = report.text.encode()
    if len(whole) <= ANSWER_BYTES:
        return report.text
    kept = whole[:ANSWER_BYTES].decode(errors="ignore").rpartition("\n")[0]
    return f"{kept}\n... {f'the rest is in {report.path}' if report.path else 'the rest was cut off'}\n"
