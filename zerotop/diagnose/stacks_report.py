"""The stacks of all ranks as one text with the verdict at its top: saved in the run directory, and the answer to the
command `stacks`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from runtime.wire.messages import Command
from zerotop.diagnose.stacks import RankStacks, ask, find_ranks
from zerotop.format import duration_text
from zerotop.hub.hub import Hub
from zerotop.state.run import RankState, RunState
from zerotop.state.stall import Stall, explain, idle_s, place_text, ranks_text

Key = TypeVar("Key")
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

    async def look(self) -> dict[int, RankStacks]:
        """The stacks of every rank, without writing anything to the run directory."""
        pids = {rank: state.hello.pid for rank, state in self._hub.state.ranks.items() if state.hello}
        async with self._turn:
            return await asyncio.to_thread(self._look, self._logs(), pids)

    def _look(self, logs: Path, pids: Mapping[int, int]) -> dict[int, RankStacks]:
        return ask(find_ranks(self._run, self._nproc, pids), pids, logs)

    async def report(self, ranks: Mapping[int, RankStacks], verdict: str) -> Report:
        """Write stacks-N.txt for the result of `look`."""
        status, state, logs = self._hub.status, self._hub.state, self._logs()
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        text = f"{status.name}, attempt {status.attempt}, {when}\n{verdict}\n\n{_text(ranks, state)}"
        try:
            path = str((await asyncio.to_thread(_save, logs, text)).relative_to(self._run))
        except OSError as error:
            path, text = "", f"(not saved: {logs}: {error.strerror or error})\n{text}"
        return Report(ranks, verdict, text, path)

    async def answer(self, command: Command) -> None:
        """Carry out the command `stacks`."""
        try:
            ranks = await self.look()
        except (OSError, psutil.Error) as error:
            self._hub.router.complete(command.id, reason=f"the ranks' processes can't be looked at: {error}")
            return
        report = await self.report(ranks, _verdict(self._hub.state, ranks))
        self._hub.router.complete(command.id, result={"path": report.path, "text": _bounded(report)})

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
    for trouble, others in _grouped(
        (found.trouble, rank) for rank, found in sorted(ranks.items()) if found.trouble and rank not in told
    ).items():
        pids = ", ".join(str(ranks[rank].pid) for rank in others[:4] if ranks[rank].pid)
        text += f"; {ranks_text(others)}: {trouble}" + (f" (pid {pids})" if pids else "")
    return text


def _verdict(state: RunState, ranks: Mapping[int, RankStacks]) -> str:
    """The verdict for an explicit request, which reports a stall earlier than the automatic check."""
    idle = min((idle_s(rank, state.hub_now_ns) for rank in state.ranks.values() if rank.goodbye is None), default=0.0)
    stall = explain(state, idle, ASKED_S) if idle >= ASKED_S and state.state_name in ("running", "stopping") else None
    if stall is None:
        return blame(Stall(0.0, f"{state.state_name} at step {state.step}"), ranks, state)
    return f"no progress for {duration_text(idle)}: {blame(stall, ranks, state)}"


# ---- the text --------------------------------------------------------------------------------------------------------
def _text(ranks: Mapping[int, RankStacks], state: RunState) -> str:
    """A line per rank, then every distinct stack once under the ranks that share it, training threads first."""
    lines = [_rank_line(stacks, state.ranks.get(rank), state.hub_now_ns) for rank, stacks in sorted(ranks.items())]
    for main in (True, False):
        stacks = _grouped(
            (thread.frames, rank)
            for rank, found in sorted(ranks.items())
            for thread in found.threads
            if thread.main == main
        )
        for frames, who in stacks.items():
            lines += [
                "",
                f"{ranks_text(who)}, {'training' if main else 'another'} thread (innermost call first):",
                *frames,
            ]
    return "\n".join(lines) + "\n"


def _rank_line(stacks: RankStacks, known: RankState | None, hub_now_ns: int) -> str:
    parts = [f"pid {stacks.pid}" if stacks.pid else "no process", stacks.host]
    if stacks.trouble and stacks.trouble != stacks.host:
        parts.append(stacks.trouble)
    beat = known.heartbeat if known else None
    if known is None or beat is None:
        parts.append("nothing heard yet")
    else:
        parts.append(f"step {beat.step}, {beat.phase}")
        if beat.micro_step:
            parts.append(f"micro-step {beat.micro_step}/{beat.micro_steps}")
        if beat.entered_seq:
            op = f" ({beat.entered_op})" if beat.entered_op else ""
            over = "completed" if beat.completed_seq >= beat.entered_seq else f"completed up to {beat.completed_seq}"
            parts.append(f"last collective {beat.entered_seq}{op}, {over}")
        silent_s = max(0, hub_now_ns - known.heard_ns) / 1e9
        if silent_s >= 2:
            parts.append(f"nothing heard for {duration_text(silent_s)}")
    return f"rank {stacks.rank}: " + ", ".join(parts)


def _grouped(pairs: Iterable[tuple[Key, int]]) -> dict[Key, tuple[int, ...]]:
    """Key -> the ranks that have it, in order, each once."""
    groups: dict[Key, list[int]] = {}
    for key, rank in pairs:
        ranks = groups.setdefault(key, [])
        if rank not in ranks:
            ranks.append(rank)
    return {key: tuple(ranks) for key, ranks in groups.items()}


def _save(logs: Path, text: str) -> Path:
    """Write the next stacks-N.txt. Raises OSError."""
    taken = [path.stem.removeprefix("stacks-") for path in logs.glob("stacks-*.txt")]
    number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
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
