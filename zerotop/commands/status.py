"""zerotop status: the state of one run, from its hub while it is live and from its recording afterwards."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.source.base import Source

HUB_ANSWERS_WITHIN_S = 5.0


def register(subparsers: Any) -> None:
    """Add `status` to the command line."""
    parser = subparsers.add_parser(
        "status", help="show where a run is", description="Show where a run is: step, loss, and every rank."
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN",
        help="a run, or user@host[:run]; default: the newest live run, else the newest",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the state."""
    from zerotop.documents import status_document, status_text
    from zerotop.output import print_json, say, show
    from zerotop.rundir.directory import find_any_run
    from zerotop.source.opening import open_source
    from zerotop.source.target import parse_target

    target = parse_target(arguments.target)
    if target.host:
        from zerotop.source.ssh import run_there

        words = ["status", *([target.run] if target.run else []), *(["--json"] if arguments.json else [])]
        return run_there(target.host, words)

    entry = find_any_run(target.run)
    source = open_source(entry)
    try:
        if not entry.live or entry.sockets.path("screens").exists():  # else it is only just starting
            listen(source)
        if source.connection not in ("live", "ended"):
            say(f"zerotop: the hub of {entry.name} does not answer ({source.connection}); state from its directory:")
        document = status_document(source.state, entry, connection=source.connection)
    finally:
        source.close()
    if arguments.json:
        print_json(document)
    else:
        show(status_text(document))
    return 0


def listen(source: Source) -> None:
    """Wait for the whole state from the hub, for a limited time."""
    deadline = time.monotonic() + HUB_ANSWERS_WITHIN_S
    while time.monotonic() < deadline:
        source.poll()
        if source.connection != "connecting":
            return
        source.wait(0.05)
