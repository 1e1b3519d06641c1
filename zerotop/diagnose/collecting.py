"""Evidence that takes longer than a look at the stacks: C frames, Flight Recorders, NCCL's own view. Saved in a folder
of the run directory, summed up in sentences.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from runtime.process.atomic_file import replace_text
from runtime.wire.rundir import evidence_folder, flight_file
from zerotop.diagnose import flight, pyspy, ras
from zerotop.diagnose.frames import spokesmen
from zerotop.diagnose.pyspy import MISSING, find_pyspy
from zerotop.diagnose.stacks import RankStacks, with_native_frames
from zerotop.hub.hub import Hub

FLIGHT_S = 2.0
"""How long to wait for the ranks' Flight Recorders; a dump takes some milliseconds."""
NATIVE_RANKS = 4
"""Ranks whose C frames are read unless ranks were named: one of each group with equal stacks, the smallest first."""
KEPT_FIRST, KEPT_LAST = 20, 30
"""Reports of one attempt that are kept: the first ones, which verdicts name, and the newest."""
NO_NATIVE = f"no C frames: {MISSING} (pip install py-spy)"
_POLL_S = 0.02


@dataclass(frozen=True)
class Collected:
    """What was found. `flight`: what the Flight Recorders say is wrong. `sections`: title -> text of the report.
    `files`: names in the evidence folder."""

    flight: tuple[flight.FlightFinding, ...] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        return tuple(f"Flight Recorder: {found.text}" for found in self.flight)


async def collect(hub: Hub, logs: Path, number: int, ranks: Mapping[int, RankStacks]) -> Collected:
    """Flight Recorders and NCCL's own view, saved in evidence-`number` of the attempt's folder `logs`. Takes some
    seconds at most. Raises OSError if the folder can't be made."""
    folder = evidence_folder(logs, number)
    folder.mkdir(mode=0o700)
    asked = hub.request_flight(number)
    recorders, nccl = await asyncio.gather(
        asyncio.to_thread(_flight, folder, asked, ranks), asyncio.to_thread(_nccl, folder, _uses_nccl(hub))
    )
    sections: dict[str, str] = {}
    found: list[flight.FlightFinding] = []
    if asked:
        places = {rank: found.place for rank, found in ranks.items() if found.threads and not found.trouble}
        sections["Flight Recorder (torch's own collectives)"] = _flight_text(recorders, hub, places)
        found = flight.findings(recorders, places)
    if nccl:
        sections["NCCL RAS (evidence beside others, never alone)"] = nccl
    files = tuple(sorted(path.name for path in folder.iterdir()))
    if not files:
        folder.rmdir()
    return Collected(tuple(found), sections, files)


def _key(found: RankStacks) -> object:
    return next((thread.frames for thread in found.threads if thread.main), found.trouble)


def _uses_nccl(hub: Hub) -> bool:
    return ras.ADDRESS_VARIABLE in os.environ or any(
        "nccl" in known.hello.backend for known in hub.state.ranks.values() if known.hello
    )


# ---- Flight Recorder -------------------------------------------------------------------------------------------------
def _flight(folder: Path, asked: list[int], ranks: Mapping[int, RankStacks]) -> flight.Flight:
    """Wait for the files of the ranks that can answer, and read them."""
    expected = [rank for rank in asked if rank not in ranks or not ranks[rank].trouble]
    deadline = time.monotonic() + FLIGHT_S
    while time.monotonic() < deadline and any(_is_due(folder, rank, ranks.get(rank)) for rank in expected):
        time.sleep(_POLL_S)
    failed = [rank for rank in asked if not flight_file(folder, rank).exists()]
    for rank in failed:  # one that has just failed left its own
        left = flight_file(folder.parent, rank)
        if left.exists():
            shutil.copyfile(left, flight_file(folder, rank))
    found = flight.read_flight(folder, asked)
    reader = find_pyspy()
    troubles = {rank: _why_silent(ranks.get(rank), why, reader) for rank, why in found.troubles.items()}
    return flight.Flight(found.groups, found.members, troubles, found.names)


def _is_due(folder: Path, rank: int, found: RankStacks | None) -> bool:
    """Whether the file of this rank is missing and may still come."""
    lives = found is None or found.pid is None or psutil.pid_exists(found.pid)
    return lives and not flight_file(folder, rank).exists()


def _why_silent(found: RankStacks | None, why: str, reader: str | None) -> str:
    if why != flight.SILENT or found is None:
        return why
    if found.trouble:
        return found.trouble
    if reader is not None and found.pid and pyspy.dump(reader, found.pid, native=False).holds_gil:
        return f"{why}: its training thread holds the GIL"
    return why


def _flight_text(recorders: flight.Flight, hub: Hub, places: Mapping[int, str]) -> str:
    text = flight.text(recorders, places)
    beats = [known.heartbeat for known in hub.state.ranks.values() if known.heartbeat and known.goodbye is None]
    if recorders.groups and not flight.findings(recorders) and any(b.entered_seq > b.completed_seq for b in beats):
        text += "\nwhat is open is a collective that zerotop carries out in shared memory: the ranks' lines number it"
    return text


# ---- py-spy, NCCL ----------------------------------------------------------------------------------------------------
def read_native(ranks: Mapping[int, RankStacks], wanted: Iterable[int] | None = None) -> dict[int, RankStacks]:
    """`ranks` with the C frames of those that are `wanted`; None: of those that tell most. Blocks, for at most
    `pyspy.NATIVE_S`; each process is stopped while it is read."""
    reader = find_pyspy()
    if reader is None:
        return dict(ranks)
    told = {rank: _key(found) for rank, found in ranks.items()}
    return with_native_frames(ranks, tuple(wanted or spokesmen(told, NATIVE_RANKS)), reader)


def _nccl(folder: Path, used: bool) -> str:
    """Save what NCCL says of itself, and sum it up; empty for a run without NCCL."""
    address = ras.ras_address(os.environ) if used else None
    if address is None:
        return ""
    answer = ras.query(address)
    if answer.text:
        replace_text(folder / ("ras.txt" if answer.document is None else "ras.json"), answer.text)
    for name, content in ras.inspector_files(os.environ):
        (folder / f"inspector-{name}").write_bytes(content)
    return ras.summary(answer)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def _numbers(logs: Path) -> list[int]:
    names = [path.stem.removeprefix("stacks-") for path in logs.glob("stacks-*.txt")]
    names += [path.name.removeprefix("evidence-") for path in logs.glob("evidence-*")]
    return sorted({int(name) for name in names if name.isdecimal()})


def next_number(logs: Path) -> int:
    """The number of the next report of this attempt. Reports between the first and the newest ones are removed."""
    there = _numbers(logs)
    for number in there[KEPT_FIRST : max(KEPT_FIRST, len(there) - KEPT_LAST + 1)]:
        (logs / f"stacks-{number}.txt").unlink(missing_ok=True)
        shutil.rmtree(evidence_folder(logs, number), ignore_errors=True)
    return (there[-1] if there else 0) + 1
