"""The stacks of all ranks as one text with the verdict at its top: saved in the run directory, and the answer to the
command `stacks`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from runtime.wire.messages import Command
from zerotop.diagnose.collecting import Collected, collect, native_note, next_number
from zerotop.diagnose.frames import grouped
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

    @property
    def compiling(self) -> tuple[int, ...]:
        """Ranks whose training thread is inside a compiler."""
        return tuple(rank for rank, stacks in sorted(self.ranks.items()) if stacks.compiling)


class StackTaker:
    """Takes the stacks of the ranks of `hub`, one request at a time."""

    def __init__(self, run: Path, nproc: int, hub: Hub) -> None:
        self._run = run
        self._nproc = nproc
        self._hub = hub
        self._turn = asyncio.Lock()

    async def look(self, only: Collection[int] | None = None) -> dict[int, RankStacks]:
        """The stacks of every rank, or of those in `only`, without writing anything to the run directory."""
        pids = {rank: state.hello.pid for rank, state in self._hub.state.ranks.items() if state.hello}
        async with self._turn:
            return await asyncio.to_thread(self._look, self._logs(), pids, only)

    def _look(self, logs: Path, pids: Mapping[int, int], only: Collection[int] | None) -> dict[int, RankStacks]:
        found = find_ranks(self._run, self._nproc, pids)
        wanted = found if only is None else {rank: process for rank, process in found.items() if rank in only}
        return ask(wanted, pids, logs, reader=find_pyspy())

    async def report(
        self,
        ranks: Mapping[int, RankStacks],
        verdict: str,
        *,
        evidence: bool = False,
        native: Collection[int] | None = None,
    ) -> Report:
        """Write stacks-N.txt for the result of `look`. evidence: collect also what takes some seconds, in a folder
        beside it (collecting.py); native: the ranks whose C frames are wanted, if not of those that tell most."""
        async with self._turn:
            return await self._report(ranks, verdict, evidence, native)

    async def _report(
        self, ranks: Mapping[int, RankStacks], verdict: str, evidence: bool, native: Collection[int] | None
    ) -> Report:
        status, state, logs = self._hub.status, self._hub.state, self._logs()
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        collected, folder, problem = Collected(ranks), "", ""
        try:
            number = await asyncio.to_thread(next_number, logs)
            if evidence:
                collected = await collect(self._hub, logs, number, ranks, native)
                folder = f"logs/{logs.name}/evidence-{number}" if collected.files else ""
        except OSError as error:
            number, problem = 0, f"{logs}: {error.strerror or error}"
        parts = [f"{status.name}, attempt {status.attempt}, {when}\n{verdict}"]
        where = where_text(collected.ranks)
        parts[0] += "".join(f"\n{line}" for line in (where, *collected.findings) if line)
        parts.append(stacks_text(collected.ranks, state))
        parts += [f"{title}:\n{section}\n" for title, section in collected.sections.items()]
        if evidence and (note := native_note()):
            parts.append(f"{note}\n")
        if folder:
            parts.append(f"saved beside this: {folder}/ ({', '.join(collected.files)})\n")
        text, path = "\n\n".join(part.rstrip("\n") for part in parts) + "\n", ""
        if not problem:
            try:
                path = str((await asyncio.to_thread(_save, logs, text, number)).relative_to(self._run))
            except OSError as error:
                problem = f"{logs}: {error.strerror or error}"
        if problem:
            text = f"(not saved: {problem})\n{text}"
        return Report(collected.ranks, verdict, text, path, collected.findings, folder)

    async def answer(self, command: Command) -> None:
        """Carry out the command `stacks`. Of a run that stands still, or with the argument `native`, everything is
        collected; a run that trains is not held up."""
        only, native = command.arguments.get("ranks"), bool(command.arguments.get("native"))
        if unknown := [rank for rank in only or () if rank >= self._nproc]:
            reason = f"stacks: there is no rank {unknown[0]}: the ranks are 0 to {self._nproc - 1}"
            self._hub.router.complete(command.id, reason=reason)
            return
        try:
            ranks = await self.look(only)
        except (OSError, psutil.Error) as error:
            self._hub.router.complete(command.id, reason=f"the ranks' processes can't be looked at: {error}")
            return
        still = _idle(self._hub.state) >= ASKED_S
        verdict = _verdict(self._hub.state, ranks)
        report = await self.report(ranks, verdict, evidence=still or native, native=only if native else None)
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
    """For how many seconds no rank has made progress."""
    return min((idle_s(rank, state.hub_now_ns) for rank in state.ranks.values() if rank.goodbye is None), default=0.0)


def _verdict(state: RunState, ranks: Mapping[int, RankStacks]) -> str:
    """The verdict for an explicit request, which reports a stall earlier than the automatic check."""
    idle = _idle(state)
    stall = explain(state, idle, ASKED_S) if idle >= ASKED_S and state.state_name in ("running", "stopping") else None
    if stall is None:
        return blame(Stall(0.0, f"{state.state_name} at step {state.step}"), ranks, state)
    return f"no progress for {duration_text(idle)}: {blame(stall, ranks, state)}"


def _save(logs: Path, text: str, number: int) -> Path:
    """Write stacks-`number`.txt. Raises OSError."""
    path = logs / f"stacks-{number}.txt"
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
    return path


def _bounded(report: Report) -> str:
    whole = report.text.encode()
    if len(whole) <= ANSWER_BYTES:
        return report.text
    kept = whole[:ANSWER_BYTES].decode(errors="ignore").rpartition("\n")[0]
    return f"{kept}\n... {f'the rest is in {report.path}' if report.path else 'the rest was cut off'}\n"
