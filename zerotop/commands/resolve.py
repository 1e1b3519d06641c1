"""zerotop resolve: what a zerotop on another machine needs to attach to a run here. Not meant for users."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry


def register(subparsers: Any) -> None:
    """Add `resolve` to the command line."""
    parser = subparsers.add_parser("resolve", description="Say where a run's sockets are (what attach asks over SSH).")
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("--recorded", action="store_true", help="also what the recording of an ended run comes to")
    parser.add_argument("--json", action="store_true", help="the only form there is")


def run(arguments: argparse.Namespace) -> int:
    """Print {name, live, here, host, path, sockets, protocol, status}; status is a `RunStatus`. With --recorded also
    `recorded`: an encoded `Snapshot`, because its numbers may be NaN, which JSON does not have."""
    from runtime.wire.messages import PROTOCOL
    from zerotop.output import print_json
    from zerotop.rundir.directory import find_any_run

    entry = find_any_run(arguments.run)
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
            **({"recorded": _recorded(entry)} if arguments.recorded else {}),
        }
    )
    return 0


def _recorded(entry: RunEntry) -> str:
    from runtime.wire.codec import encode
    from zerotop.source.recorded import RecordedSource

    source = RecordedSource(entry.path, entry.status)
    source.start()
    return encode(source.snapshot()).decode()
