"""zerotop ls: the runs of this user, here or on another machine."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `ls` to the command line."""
    parser = subparsers.add_parser("ls", help="list runs", description="List runs, newest first.")
    parser.add_argument("host", nargs="?", metavar="HOST", help="another machine, as user@host; default: this one")
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    from zerotop.output import print_json, say, show

    if arguments.host:
        from zerotop.source.ssh import run_there
        from zerotop.source.target import checked_host

        host = checked_host(arguments.host.removesuffix(":"))
        return run_there(host, ["ls", *(["--json"] if arguments.json else [])])

    from zerotop.documents import list_document, list_text
    from zerotop.rundir.directory import list_runs, runs_home

    document = list_document(list_runs())
    if arguments.json:
        print_json(document)
    elif document:
        show(list_text(document))
    else:
        say(f"no runs in {runs_home()}: zerotop launch CONFIG starts one")
    return 0
