"""What the Flight Recorders of all ranks say together: which rank has not enqueued which collective of
torch.distributed, and where ranks enqueued different ones under the same number. Torch-free.

Only torch's own collectives are in it. Those that zerotop carries out in shared memory are numbered by the heartbeats.
On Gloo an entry's `state` stays "scheduled" for ever, so completion is read from `pg_status` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from runtime.wire.rundir import flight_file
from zerotop.diagnose.frames import grouped, place, python_frame
from zerotop.state.stall import odd_ones_out, ranks_text

FILE_BYTES = 8 * 2**20
"""Size limit of a rank's file; a larger one is not read."""
FINDINGS_SHOWN = 6
SILENT = "it did not answer"
_SAME_SIZES = frozenset(
    "all_reduce allreduce broadcast reduce all_gather _all_gather_base allgather reduce_scatter _reduce_scatter_base "  # noqa: SIM905
    "all_gather_into_tensor reduce_scatter_tensor".split()
)
"""Operations to which every rank gives an input of one size."""


@dataclass(frozen=True)
class Enqueued:
    """One collective of one rank. `op` is without the backend's name."""

    op: str
    sizes: str
    where: str
    """The call and its line, as `frames.place` says it; empty unless the rank has torch's compiler loaded, without
    which torch does not tell it."""


@dataclass(frozen=True)
class FlightFinding:
    """What is wrong, as a sentence, and with which ranks. different: ranks have enqueued other collectives than the
    others; with two camps of one size, all ranks. missing: ranks have not enqueued one. open: ranks have not completed
    one that all have enqueued."""

    what: Literal["different", "missing", "open"]
    ranks: tuple[int, ...]
    text: str

    def document(self) -> dict[str, Any]:
        """As the event of a hang carries it."""
        return {"what": self.what, "ranks": list(self.ranks), "text": self.text}


@dataclass(frozen=True)
class GroupOnRank:
    """One process group as one rank knows it. -1: none yet."""

    enqueued: int = -1
    completed: int = -1
    collectives: Mapping[int, Enqueued] = field(default_factory=dict)
    """Sequence number -> collective, of the newest ones."""


@dataclass(frozen=True)
class Flight:
    """All ranks' recorders. `groups`: name of the process group -> rank -> what it knows; `members`: its ranks, where a
    rank named them; `troubles`: rank -> why it has no recorder."""

    groups: Mapping[str, Mapping[int, GroupOnRank]] = field(default_factory=dict)
    members: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    troubles: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Name of a group -> how to call it for people."""


def read_flight(folder: Path, asked: Sequence[int]) -> Flight:
    """The recorders that the ranks `asked` have written to `folder`."""
    groups: dict[str, dict[int, GroupOnRank]] = {}
    members: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    troubles: dict[int, str] = {}
    for rank in asked:
        path = flight_file(folder, rank)
        try:
            if path.stat().st_size > FILE_BYTES:
                troubles[rank] = f"its file is larger than {FILE_BYTES >> 20} MiB"
                continue
            document = json.loads(path.read_bytes())
            found, called = _groups_of(document)
            known = document.get("groups") or {}
            members |= {str(name): tuple(int(r) for r in group["ranks"]) for name, group in known.items()}
        except FileNotFoundError:
            troubles[rank] = SILENT
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            troubles[rank] = f"its file can't be read: {type(error).__name__}: {error}"
            continue
        names |= called
        for name, group in found.items():
            groups.setdefault(name, {})[rank] = group
        if document.get("trouble"):
            troubles[rank] = str(document["trouble"])
    return Flight(groups, members, troubles, names)


def _groups_of(document: Mapping[str, Any]) -> tuple[dict[str, GroupOnRank], dict[str, str]]:
    groups: dict[str, GroupOnRank] = {}
    names: dict[str, str] = {}
    for recorder in document["recorders"].values():
        by_name: dict[str, dict[int, Enqueued]] = {}
        numbers: dict[str, str] = {}
        for entry in recorder["entries"]:
            name, description = (str(part) for part in (*entry["process_group"], "")[:2])
            names[name] = "the default group" if description == "default_pg" else f"process group {name}"
            numbers[str(entry.get("pg_id", name))] = name
            collectives = by_name.setdefault(name, {})
            if not entry.get("is_p2p"):
                collectives[int(entry["collective_seq_id"])] = _enqueued(entry)
        for number, status in recorder["pg_status"].items():
            if (name := numbers.get(str(number), "")) in by_name:
                enqueued, completed = (
                    int(status.get(f"last_{which}_collective", -1)) for which in ("enqueued", "completed")
                )
                groups[name] = GroupOnRank(enqueued, completed, by_name.get(name, {}))
        for name, collectives in by_name.items():  # torch without pg_status
            groups.setdefault(name, GroupOnRank(max(collectives, default=0), -1, collectives))
    return groups, names


def _enqueued(entry: Mapping[str, Any]) -> Enqueued:
    op = str(entry.get("profiling_name", "")).rpartition(":")[2]
    sizes = ", ".join(
        f"{list(size)} {kind}"
        for size, kind in zip(entry.get("input_sizes") or [], entry.get("input_dtypes") or [], strict=False)
    )
    frames = (python_frame(str(file), int(line or 0), str(name)) for file, line, name in entry.get("frames") or [])
    return Enqueued(op, sizes, place(frames))


def findings(flight: Flight, places: Mapping[int, str] | None = None) -> list[FlightFinding]:
    """What is wrong, the earliest cause first: collectives that differ, then ranks that are missing.
    Empty if every rank has enqueued the same. `places`: where each rank is now, which is the call site of a collective
    that it waits in."""
    different, missing, open_everywhere = [], [], []
    for name, known in sorted(flight.groups.items()):
        called, ranks = flight.names.get(name, name), _placed(known, places or {})
        if difference := _difference(called, ranks):
            different.append(difference)
        if absent := _missing(called, ranks, flight.members.get(name, ()), flight.troubles):
            missing.append(absent)
        elif unfinished := _open(called, ranks):
            open_everywhere.append(unfinished)
    return [*different, *missing, *open_everywhere][:FINDINGS_SHOWN]


def _placed(ranks: Mapping[int, GroupOnRank], places: Mapping[int, str]) -> dict[int, GroupOnRank]:
    """With the call site of the newest collective of each rank that has not completed it."""
    placed = dict(ranks)
    for rank, group in ranks.items():
        newest = group.collectives.get(group.enqueued)
        if newest is not None and not newest.where and places.get(rank) and group.completed < group.enqueued:
            collectives = {**group.collectives, group.enqueued: replace(newest, where=places[rank])}
            placed[rank] = replace(group, collectives=collectives)
    return placed


def _difference(called: str, ranks: Mapping[int, GroupOnRank]) -> FlightFinding | None:
    """The first number under which ranks enqueued different operations or sizes."""
    for seq in sorted({seq for group in ranks.values() for seq in group.collectives}):
        there = {rank: group.collectives[seq] for rank, group in ranks.items() if seq in group.collectives}
        ops = grouped((found.op, rank) for rank, found in sorted(there.items()))
        sizes = grouped((found.sizes, rank) for rank, found in sorted(there.items()))
        if len(ops) > 1:
            what = "different collectives"
        elif len(sizes) > 1 and next(iter(ops)) in _SAME_SIZES:
            what = "different sizes"
        else:
            continue
        kinds = grouped(
            (f"{found.op} of {found.sizes or 'no tensor'}" + (f" ({found.where})" if found.where else ""), rank)
            for rank, found in sorted(there.items())
        )
        told = "; ".join(f"{ranks_text(who)}: {kind}" for kind, who in kinds.items())
        text = f"{what} under number {seq} of {called}: {told}"
        return FlightFinding("different", odd_ones_out(list(kinds.values())), text)
    return None


def _missing(
    called: str, ranks: Mapping[int, GroupOnRank], members: Sequence[int], troubles: Mapping[int, str]
) -> FlightFinding | None:
    """The ranks that have not enqueued what others wait in."""
    enqueued = {rank: group.enqueued for rank, group in ranks.items()}
    for rank in members:  # one that has a recorder, and nothing of this group in it
        if rank not in enqueued and rank not in troubles:
            enqueued[rank] = 0
    completed = max((group.completed for group in ranks.values()), default=-1)
    lowest = min(enqueued.values(), default=0)
    seq = max(lowest, completed) + 1
    absent = tuple(rank for rank, last in sorted(enqueued.items()) if last < seq)
    waiting = tuple(rank for rank, last in sorted(enqueued.items()) if last >= seq)
    if not absent or not waiting:
        return None
    found = next((ranks[r].collectives[seq] for r in waiting if r in ranks and seq in ranks[r].collectives), None)
    op = found.op if found else "collective"
    where = f", at {found.where.partition(' at ')[2]}" if found and " at " in found.where else ""
    has, wait = "has" if len(absent) == 1 else "have", "waits" if len(waiting) == 1 else "wait"
    text = f"{ranks_text(absent)} {has} not enqueued {op} {seq} of {called}; {ranks_text(waiting)} {wait} in it{where}"
    if unknown := tuple(rank for rank in sorted(troubles) if rank in members and rank not in enqueued):
        text += f"; nothing is known of {ranks_text(unknown)}"
    return FlightFinding("missing", absent, text)


def _open(called: str, ranks: Mapping[int, GroupOnRank]) -> FlightFinding | None:
    """A collective that all ranks have enqueued and some not completed."""
    late = {rank: group for rank, group in ranks.items() if -1 < group.completed < group.enqueued}
    late |= {rank: group for rank, group in ranks.items() if group.completed == -1 and group.enqueued > 0}
    if not late:
        return None
    seq = min(group.completed if group.completed >= 0 else 0 for group in late.values()) + 1
    found = next((group.collectives[seq] for group in ranks.values() if seq in group.collectives), None)
    who = tuple(rank for rank, group in sorted(late.items()) if group.completed < seq)
    has = "has" if len(who) == 1 else "have"
    op = found.op if found else "collective"
    text = f"all ranks with a recorder have enqueued {op} {seq} of {called}, {ranks_text(who)} {has} not completed it"
    return FlightFinding("open", who, text)


def text(flight: Flight, places: Mapping[int, str] | None = None) -> str:
    """The section of the stacks report: findings, then a line per group, then the ranks without a recorder."""
    lines = [found.text for found in findings(flight, places)] or ["no collective of torch.distributed is open"]
    for name, ranks in sorted(flight.groups.items()):
        states = grouped(
            (f"enqueued {group.enqueued}, completed {group.completed}", rank) for rank, group in sorted(ranks.items())
        )
        told = "; ".join(f"{ranks_text(who)}: {state}" for state, who in states.items())
        lines.append(f"{flight.names.get(name, name)}: {told}")
    for trouble, who in grouped((why, rank) for rank, why in sorted(flight.troubles.items())).items():
        lines.append(f"{ranks_text(who)}: no Flight Recorder: {trouble}")
    return "\n".join(lines)
