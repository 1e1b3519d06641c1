"""zerotop report: pack what is known of a run into one file to attach to a bug report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.bugreport.pack import Packed
    from zerotop.rundir.directory import RunEntry
    from zerotop.state.run import RunState

STACKS_S = 45.0
"""How long to wait for fresh stacks of a live run."""


def register(subparsers: Any) -> None:
    """Add `report` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="pack what is known of a run into one file for a bug report",
        description="Pack verdict, stacks, Flight Recorders, config, versions, logs, events, commands and recording of "
        "a run into one file to attach to a bug report. Tokens, passwords, keys, the home directory and the user's "
        "name are removed, samples of training data left out; manifest.json in it says how often. Works while the run "
        "lives, after its end, and after a crash.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN",
        help="a run, or user@host[:run]; default: the newest live run, else the newest",
    )
    parser.add_argument(
        "out", nargs="?", metavar="OUT", help="a folder, or a file .tar.gz or .zip that does not exist; default: here"
    )
    parser.add_argument("--no-stacks", action="store_true", help="take no fresh stacks of a live run")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Write the report."""
    from zerotop.bugreport.pack import pack
    from zerotop.bugreport.system import redactor_for_me
    from zerotop.commands.doctor import findings
    from zerotop.commands.status import listen
    from zerotop.documents import status_document, status_text
    from zerotop.output import CommandError, print_json
    from zerotop.rundir.directory import find_any_run
    from zerotop.source.base import SourceError
    from zerotop.source.opening import open_source
    from zerotop.source.target import parse_target

    target = parse_target(arguments.target)
    if target.host:
        return _run_there(target.host, target.run, arguments)
    entry = find_any_run(target.run)
    path = _path(arguments.out, entry.name)
    notes: list[str] = []
    document, pids = {}, {}
    try:
        source = open_source(entry)
    except SourceError as error:  # it runs on another host, and the home is shared
        notes.append(str(error))
    else:
        try:
            if not entry.live or entry.sockets.path("screens").exists():
                listen(source)
            if entry.live and source.connection == "live" and not arguments.no_stacks:
                notes += _fresh_stacks(source)
            document = status_document(source.state, entry, connection=source.connection)
            pids = _pids(source.state) if entry.live else {}
        finally:
            source.close()
    text = status_text(document) if document else f"{entry.name}: {entry.status.state}, {entry.status.reason}"
    try:
        packed = pack(
            entry.path,
            path,
            redactor_for_me(_rank_variables(pids)),
            status=document or entry.status.model_dump(),
            status_text=text,
            doctor=[finding._asdict() for finding in findings()],
            pids=pids,
            notes=notes,
        )
    except OSError as error:
        raise CommandError(f"the report can't be written to {path}: {error.strerror or error}", exit_code=1) from None
    if arguments.json:
        print_json(_document(packed, entry))
    else:
        _show(packed)
    return 0


def _run_there(host: str, name: str | None, arguments: argparse.Namespace) -> int:
    from zerotop.output import say
    from zerotop.source.ssh import run_there

    if arguments.out and not name:
        from zerotop.output import CommandError

        raise CommandError(f"name the run, too: zerotop report {host}:RUN OUT")
    words = ["report", *([name] if name else []), *([arguments.out] if arguments.out else [])]
    words += [f"--{flag}" for flag in ("no-stacks", "json") if getattr(arguments, flag.replace("-", "_"))]
    code = run_there(host, words)
    if code == 0:
        say(f"zerotop: the file is on {host}; scp fetches it")
    return code


def _path(out: str | None, name: str) -> Path:
    """Where to write. Raises CommandError for a name that is taken or of another kind."""
    from zerotop.bugreport.pack import SUFFIXES, default_name
    from zerotop.output import CommandError

    path = Path(out) if out else Path(default_name(name))
    if path.is_dir():
        path = path / default_name(name)
    if not path.name.endswith(SUFFIXES):
        raise CommandError(f"report: expected a folder or a name that ends in {', '.join(SUFFIXES)}, got {out}")
    if path.exists():
        raise CommandError(f"report: {path} exists: choose another name, or remove it")
    if not path.parent.is_dir():
        raise CommandError(f"report: there is no folder {path.parent}")
    return path


def _fresh_stacks(source: Any) -> list[str]:
    """Have the hub save the stacks of all ranks; returns why that failed."""
    from zerotop.output import CommandError
    from zerotop.source.command_answers import ask, new_command

    try:
        record = ask(source, new_command("stacks"), until="applied", timeout_s=STACKS_S)
    except CommandError as error:
        return [f"no fresh stacks: {error}"]
    return [] if record.ack.state == "applied" else [f"no fresh stacks: {record.ack.reason or record.ack.state}"]


def _pids(state: RunState) -> dict[int, int]:
    import socket

    return {
        rank: known.hello.pid
        for rank, known in state.ranks.items()
        if known.hello and not known.goodbye and known.hello.host == socket.gethostname()
    }


def _rank_variables(pids: dict[int, int]) -> dict[str, str]:
    """The environment of a rank, whose secrets may be others than those of this shell."""
    import psutil

    for pid in pids.values():
        try:
            return psutil.Process(pid).environ()
        except (psutil.Error, OSError):
            continue
    return {}


def _document(packed: Packed, entry: RunEntry) -> dict[str, Any]:
    files = [{"name": name, "bytes": size, "of_bytes": whole or size} for name, size, whole in packed.files]
    return {
        "run": entry.name,
        "path": str(packed.path),
        "bytes": packed.size,
        "files": files,
        "removed": dict(packed.removed),
        "notes": list(packed.notes),
    }


def _show(packed: Packed) -> None:
    from zerotop.format import bytes_text
    from zerotop.output import show, table

    rows = [
        (name, bytes_text(size), f"the beginning and the end of {bytes_text(whole)}" if whole else "")
        for name, size, whole in packed.files
    ]
    show(table(("FILE", "SIZE", ""), rows, right=(1,)))
    if packed.removed:
        show("removed: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(packed.removed.items())))
    for note in packed.notes:
        show(note)
    show(f"{packed.path}: {bytes_text(packed.size)}; look into it before you give it away")
