"""zerotop note: keep a remark with a run, or read those that there are."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `note` to the command line."""
    parser = subparsers.add_parser(
        "note",
        help="keep a remark with a run",
        description="Keep a remark with a run, live or over; without TEXT, print its remarks. `zerotop` and `zerotop "
        "ls` show the newest one.",
        epilog='examples:\n  zerotop note q1 "lr halved after the spike at 1200"\n  zerotop note q1',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="the remark")
    parser.add_argument("--json", action="store_true", help="print all remarks of the run as one JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Add the remark, or print all of them."""
    from zerotop.format import time_text
    from zerotop.output import print_json, say, show
    from zerotop.rundir.directory import find_run
    from zerotop.rundir.notes import add_note, read_notes
    from zerotop.source.command_answers import asker

    entry = find_run(arguments.run)
    if arguments.text:
        add_note(entry.path, " ".join(arguments.text), asker().rpartition(":")[0])
        if not arguments.json:
            say(f"noted with {entry.name}")
            return 0
    notes = read_notes(entry.path)
    if arguments.json:
        print_json([note._asdict() for note in notes])
    elif notes:
        show("\n".join(f"{time_text(note.wall_s)[:16].replace('T', ' ')}  {note.who}  {note.text}" for note in notes))
    else:
        say(f'there are no notes with {entry.name}: zerotop note {entry.name} "..." makes one')
    return 0
