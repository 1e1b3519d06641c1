"""zerotop web: the screen in a browser on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

_DESCRIPTION = """\
Serve the screen on a run to browsers on this machine, until Ctrl-C. The address that it prints holds a secret: whoever
has it sees the screen. It listens on 127.0.0.1 alone; from another machine: ssh -L 8000:127.0.0.1:8000 user@gpu-box,
with --port 8000 here, and open the address there.

The screen only shows unless --control is given: then the keys that pause, stop or abort the run work in the browser."""
_EPILOG = """\
examples:
  zerotop web                      the newest live run
  zerotop web q1 --port 8000       always under the same port
  zerotop web q1 --replay          its recording, with a time bar"""
INSTALL = "pip install '.[web]' in zerotop's source folder, or pip install textual-serve"


def register(subparsers: Any) -> None:
    """Add `web` to the command line."""
    parser = subparsers.add_parser(
        "web",
        help="show the screen in a browser on this machine",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="default: the newest live run, else the newest")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    parser.add_argument("--control", action="store_true", help="let the browser steer the run")
    parser.add_argument("--replay", action="store_true", help="the run's recording instead of the run")
    parser.add_argument("--json", action="store_true", help="print the address as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal."""
    import asyncio
    import importlib.util

    from zerotop.output import CommandError, print_json, say, show
    from zerotop.rundir.directory import find_any_run
    from zerotop.rundir.paths import error_text

    entry = find_any_run(arguments.run)
    if arguments.control and arguments.replay:
        raise CommandError("--control: a replay reaches no run; leave out one of --control and --replay")
    if not 0 <= arguments.port < 65536:
        raise CommandError(f"--port: expected 1 to 65535, got {arguments.port}")
    if importlib.util.find_spec("textual_serve") is None:
        raise CommandError(f"web needs textual-serve, which is not installed here: {INSTALL}")
    from zerotop.launch.torchrun import with_import_path
    from zerotop.tui.served import ScreenServer, listen

    try:
        listener = listen(arguments.port)
    except OSError as error:
        text = f"can't listen on 127.0.0.1, port {arguments.port}: {error_text(error)}; leave out --port for a free one"
        raise CommandError(text) from None

    words = ["replay", entry.name] if arguments.replay else ["attach", entry.name]
    words += [] if arguments.control or arguments.replay else ["--read-only"]
    server = ScreenServer([sys.executable, "-P", "-m", "zerotop", *words], listener, f"zerotop {entry.name}")

    answers = sys.stdout

    def ready(address: str) -> None:
        with contextlib.redirect_stdout(answers):
            if arguments.json:
                print_json({"address": address, "run": entry.name, "control": arguments.control})
            else:
                show(address)
        if not arguments.json:
            how = "it steers the run" if arguments.control else "it only shows"
            say(f"the screen on {entry.name} ({how}); the address is secret. Ctrl-C ends this, the run continues")

    os.environ.update(with_import_path(dict(os.environ)))  # for the processes that draw
    with contextlib.redirect_stdout(sys.stderr):  # textual-serve prints what the processes say as they end
        asyncio.run(server.serve_until_stopped(ready))
    return 0
