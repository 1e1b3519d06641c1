"""zerotop stream: what a run says, as JSON lines, until it ends."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.wire.base import Message
    from runtime.wire.messages import Packet
    from zerotop.rundir.directory import RunEntry
    from zerotop.source.live import LiveSource

WAIT_S = 0.25
RECORDED_WITHIN_S = 5.0
"""How long the recording may take to have what came before the first line of the live run."""
ALL = "all"
FREQUENT = frozenset({"phases", "collectives", "heartbeat"})
"""Kinds that are left out unless they are asked for: several of each rank, several times a second."""
DESCRIPTION = """\
Print what a run says as JSON lines, one object per message, until the run ends: steps, evaluations, events, logs,
checkpoints, alerts, verdicts, memory, nodes, commands, status. Each has its `kind`, `received_wall_s` (Unix time), the
`attempt` and the `source`; figures that are not finite are null. A live run begins with its state as it is now; one
that has ended is read from its recording. The exit code is 1 if the run failed or was aborted."""


def register(subparsers: Any) -> None:
    """Add `stream` to the command line."""
    parser = subparsers.add_parser(
        "stream",
        help="print what a run says as JSON lines",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN",
        help="a run, or user@host[:run]; default: the newest live run, else the newest",
    )
    parser.add_argument(
        "--kind",
        action="append",
        metavar="KIND",
        dest="kinds",
        help=f"only this kind of message, or {ALL}; may be repeated; default: all but {', '.join(sorted(FREQUENT))}",
    )
    parser.add_argument(
        "--from-start", action="store_true", help="begin with what the recording has of the time before now"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the lines."""
    from zerotop.rundir.directory import find_any_run
    from zerotop.source.target import parse_target

    lines = Lines(_kinds(arguments.kinds))
    target = parse_target(arguments.target)
    if target.host:
        from zerotop.source.ssh import run_there

        words = ["stream", *([target.run] if target.run else []), *(["--from-start"] if arguments.from_start else [])]
        return run_there(target.host, [*words, *(f"--kind={kind}" for kind in arguments.kinds or ())])
    entry = find_any_run(target.run)
    if entry.live:
        return _follow(entry, lines, arguments.from_start)
    _recorded(entry.path, lines, None)
    lines.put(entry.status, time.time(), entry.run.attempt, "supervisor")
    return _exit_code(entry.status.state)


def _kinds(asked: list[str] | None) -> frozenset[str] | None:
    """The kinds to print; None for every kind. Raises CommandError for one that does not exist."""
    from runtime.config.errors import nearest
    from runtime.wire.messages import message_kinds
    from zerotop.output import CommandError

    known = message_kinds()
    for kind in asked or ():
        if kind not in (*known, ALL):
            near = nearest(kind, known)
            hint = f" Did you mean {near}?" if near else ""
            raise CommandError(f"--kind {kind}: there is no such kind of message.{hint} Known: {', '.join(known)}")
    if asked and ALL in asked:
        return None
    return frozenset(asked) if asked else frozenset(known) - FREQUENT


def _exit_code(state: str) -> int:
    return 1 if state in ("failed", "aborted") else 0


class Lines:
    """Prints messages of some kinds."""

    def __init__(self, kinds: frozenset[str] | None) -> None:
        self._kinds = kinds

    def put(self, message: Message, received_wall_s: float, attempt: int, source: str) -> None:
        """Print a message, if it is of these kinds."""
        kind = str(getattr(message, "kind", ""))
        if self._kinds is None or kind in self._kinds:
            about = {"kind": kind, "received_wall_s": received_wall_s, "attempt": attempt, "source": source}
            self.write({**about, **message.model_dump(mode="json", exclude={"kind"})})

    def write(self, document: dict[str, Any]) -> None:
        """Print one object. Escapes all that is not ASCII: a line is one for every reader."""
        from zerotop.output import finite

        print(json.dumps(finite(document), allow_nan=False, separators=(",", ":")))

    def flush(self) -> None:
        """Pass on what is printed."""
        sys.stdout.flush()


def _follow(entry: RunEntry, lines: Lines, from_start: bool) -> int:
    from zerotop.source.live import LiveSource
    from zerotop.source.opening import open_source

    source = open_source(entry)
    if not isinstance(source, LiveSource):  # it has ended meanwhile
        _recorded(entry.path, lines, None)
        return _exit_code(entry.status.state)
    try:
        return _Follower(source, entry, lines).follow(from_start)
    finally:
        source.close()


class _Follower:
    """Prints a live run. Packets that come before the recording has been printed wait."""

    def __init__(self, source: LiveSource, entry: RunEntry, lines: Lines) -> None:
        self._source, self._entry, self._lines = source, entry, lines
        self._packets: list[Packet] = []
        source.on_packet = self._packets.append

    def follow(self, from_start: bool) -> int:
        while self._source.connection == "connecting":
            self._step()
        state = self._source.state
        if from_start:
            self._print_recording()
        else:
            self._print_state()
        while True:
            self._print_packets()
            if self._source.connection == "ended":
                break
            self._step()
            if self._source.state is not state:  # some messages are missing, and the state came as a whole
                state = self._source.state
                self._lines.write({"kind": "gap", "received_wall_s": time.time()})
                self._print_state()
        status = self._source.state.status
        return _exit_code(status.state if status is not None else self._entry.status.state)

    def _step(self) -> None:
        self._source.wait(WAIT_S)
        self._source.poll()

    def _print_packets(self) -> None:
        packets = self._packets[:]
        self._packets.clear()
        for packet in packets:
            self._print(packet.messages, _wall_s(packet), packet.attempt, packet.source)
        self._lines.flush()

    def _print(self, messages: Iterable[Message], wall_s: float, attempt: int, source: str) -> None:
        for message in messages:
            self._lines.put(message, wall_s, attempt, source)

    def _print_state(self) -> None:
        """What a reader needs to know beforehand: who trains, in which state."""
        state = self._source.state
        attempt = state.status.attempt if state.status is not None else self._entry.run.attempt
        hellos = [rank.hello for _, rank in sorted(state.ranks.items()) if rank.hello is not None]
        messages = [one for one in (state.status, *hellos, state.verdict, *state.alerts.values()) if one is not None]
        self._print(messages, time.time(), attempt, "snapshot")
        self._lines.flush()

    def _print_recording(self) -> None:
        """What was recorded before the first packet that waits, once the recording has it all."""
        deadline = time.monotonic() + RECORDED_WITHIN_S
        while time.monotonic() < deadline and self._source.connection == "live":
            self._step()
            if self._packets and _has_rows_after(self._entry.path, _wall_s(self._packets[0])):
                break
        _recorded(self._entry.path, self._lines, _wall_s(self._packets[0]) if self._packets else None)


def _wall_s(packet: Packet) -> float:
    """When the hub, on this machine, received it."""
    return time.time() - max(0, time.monotonic_ns() - packet.arrival_ns) / 1e9


def _has_rows_after(path: Path, wall_s: float) -> bool:
    from zerotop.hub.recorder import newest_row_wall_s

    newest = newest_row_wall_s(path)
    return newest is not None and newest > wall_s


def _recorded(path: Path, lines: Lines, before_wall_s: float | None) -> None:
    import sqlite3

    from zerotop.hub.recorder import read_recording
    from zerotop.output import CommandError

    try:
        for row in read_recording(path):
            if before_wall_s is not None and row.wall_s >= before_wall_s:
                break
            lines.put(row.message, row.wall_s, row.attempt, row.source)
    except (sqlite3.Error, OSError) as error:
        raise CommandError(f"can't read the recording in {path}: {error}", exit_code=1) from None
    lines.flush()
