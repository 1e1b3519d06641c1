"""zerotop resolve: what a zerotop on another box needs to attach to a run here; not for people."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("resolve", description="Say where a run's sockets are (what attach asks over SSH).")
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="the only form there is")


def run(arguments: argparse.Namespace) -> int:
    """Prints {name, live, here, host, path, sockets, protocol, status}; status is a `RunStatus`."""
    from runtime.wire.messages import PROTOCOL
    from zerotop.output import print_json
    from zerotop.runs.directory import find_run

    entry = find_run(arguments.run)
    print_json(
        {
            "name": entry.name,
            "live": entry.live,
            "here": entry.here,
            "host": entry.run.host,
            "path": str(entry.path),
            "sockets": str(entry.sockets.folder),
            "protocol": PROTOCOL,
            "status": entry.status.model_dump(mode="json"),
        }
    )
    return 0
