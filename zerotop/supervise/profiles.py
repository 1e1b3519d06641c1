"""Collects the parts of a profile that ranks write, and has a process of idle priority merge them into one trace."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.wire.messages import Event
from runtime.wire.profile import DONE, PART, ranks_text
from zerotop.format import bytes_text
from zerotop.hub.hub import Hub

LOOK_S = 0.25
LATE_S = 120.0
"""So long after the newest part, ranks that have handed in none are given up."""
DEATHS, AGAIN_S = 3, 2.0
"""A merging process that dies is started again after this time, so often: the end of an attempt ends it, too."""
FINISH_S = 60.0
"""How long the end of a run waits for a merge."""


@dataclass
class _Job:
    """One profile."""

    identity: str
    number: int
    ranks: list[int]
    attempt: int
    parts: dict[int, str] = field(default_factory=dict)
    """Rank -> path of its part, relative to the run directory; empty: it has none."""
    problems: list[str] = field(default_factory=list)
    newest_s: float = field(default_factory=time.monotonic)
    deaths: int = 0
    """How often the merging process has died."""
    not_before_s: float = 0.0

    @property
    def missing(self) -> list[int]:
        """Ranks that have not handed in their part."""
        return [rank for rank in self.ranks if rank not in self.parts]


class ProfileCollector:
    """The profiles of one run. `hear` and `watch` belong to the event loop."""

    def __init__(self, run: Path, hub: Hub) -> None:
        self._run, self._hub = run, hub
        self._jobs: dict[int, _Job] = {}
        self._over = False

    def hear(self, event: Event) -> None:
        """Take an event of a rank; others than those of parts are ignored."""
        if event.what != PART or event.rank is None:
            return
        data = event.data
        try:
            number, ranks = int(data["number"]), [int(rank) for rank in data["ranks"]]
            job = self._jobs.get(number) or _Job(str(data["id"]), number, ranks, self._hub.status.attempt)
            path, problem = str(data["path"]), str(data["problem"])
        except (KeyError, TypeError, ValueError):
            return
        if event.rank not in job.ranks:
            return
        self._jobs[number] = job
        job.parts[event.rank] = path
        job.newest_s = time.monotonic()
        if problem:
            job.problems.append(f"rank {event.rank}: {problem}")

    async def watch(self) -> None:
        """Merge every profile once its parts are there, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            for job in [one for one in self._jobs.values() if self._is_ready(one)]:
                await self._merge(job)

    async def finish(self) -> None:
        """The ranks have ended: merge what is there."""
        self._over = True
        deadline = time.monotonic() + FINISH_S
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)

    def _is_ready(self, job: _Job) -> bool:
        now = time.monotonic()
        if now < job.not_before_s or (self._hub.status.state == "stopping" and not self._over):
            return False  # what ends the ranks would end the merging process as well
        if self._over or not job.missing or job.attempt != self._hub.status.attempt:
            return True
        return now - job.newest_s > LATE_S

    async def _merge(self, job: _Job) -> None:
        parts = {rank: path for rank, path in job.parts.items() if path}
        problems = [*job.problems, *([f"{ranks_text(job.missing)} handed in no part"] if job.missing else [])]
        found: dict[str, Any] = {"problem": "no rank has written a trace"}
        if parts:
            found = await asyncio.to_thread(_run_merge, self._run, job.number, parts)
        if not found and job.deaths + 1 < DEATHS:
            job.deaths, job.not_before_s = job.deaths + 1, time.monotonic() + AGAIN_S
            return
        self._jobs.pop(job.number, None)
        if "path" not in found:
            problems.insert(0, str(found.get("problem", "the process that merges the parts has died")))
            where = f"; the parts are in profiles/{job.number}" if parts else ""
            text = f"profile #{job.number} can't be merged: {'; '.join(problems)}{where}"
            self._hub.event(DONE, text, "warning", id=job.identity, path="", problem="; ".join(problems))
            return
        first, last = found["steps"]
        text = (
            f"profile of steps {first} to {last}, {ranks_text(sorted(parts))}: {found['path']} "
            f"({bytes_text(found['bytes'])}); open it at ui.perfetto.dev"
        )
        text += f" ({'; '.join(problems)})" if problems else ""
        severity = "warning" if problems else "info"
        self._hub.event(DONE, text, severity, id=job.identity, path=found["path"], problem="; ".join(problems))


def _run_merge(run: Path, number: int, parts: dict[int, str]) -> dict[str, Any]:
    """Run the merging process; returns the document that it prints, empty if it died. (Its exit code is not known: the
    supervisor reaps all children.)"""
    words = [sys.executable, "-P", "-m", "zerotop.trace", str(run), str(number)]
    words += [f"{rank}={path}" for rank, path in sorted(parts.items())]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.read()
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
