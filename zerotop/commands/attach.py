"""zerotop attach: open the screen on a run."""

from __future__ import annotations

import argparse
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry
    from zerotop.source.base import Source


def register(subparsers: Any) -> None:
    """Add `attach` to the command line."""
    parser = subparsers.add_parser(
        "attach",
        help="open the screen on a run",
        description="Open the screen on a run, here or on another machine over SSH. Leaving it (q) never touches "
        "the run. A run that has ended opens as its recording left it.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="run | user@host | user@host:run; default: the newest live run, else the newest",
    )
    parser.add_argument("--read-only", action="store_true", help="show only: the keys that steer the run do nothing")


def run(arguments: argparse.Namespace) -> int:
    """Open the screen."""
    from runtime.process.garbage import importing

    with importing():
        from zerotop.output import CommandError, can_draw
        from zerotop.rundir.directory import find_any_run
        from zerotop.source.opening import open_source
        from zerotop.source.target import parse_target

    target = parse_target(arguments.target)
    # First, because it is cheap: report a run that does not exist before a missing terminal.
    entry = None if target.host else find_any_run(target.run)
    if not can_draw():
        raise CommandError("attach draws a screen and needs a terminal; without one: zerotop status, zerotop logs -f")
    source: Source
    if entry is not None:
        source = open_source(entry)
    else:
        from zerotop.source.remote import open_remote

        assert target.host is not None
        source = open_remote(target.host, target.run)
    ended_before = source.connection == "ended"
    exit_code = show(source, read_only=arguments.read_only, host=target.host, entry=entry)
    return 0 if ended_before and exit_code == 1 else exit_code  # looking at a failure of the past is none


def show(source: Source, *, read_only: bool = False, host: str | None = None, entry: RunEntry | None = None) -> int:
    """The screen on a started source until the user leaves it; closes the source. `host` is the machine of the run,
    `entry` its directory, if it is on this one.

    Returns 1 if the run failed or was aborted meanwhile, 128 plus the number of a signal that ended the screen, else 0.
    """
    from runtime.process.garbage import importing
    from runtime.wire.messages import LIVE_STATES
    from zerotop.output import say
    from zerotop.tui.first_frame import first_frame

    try:
        with first_frame(entry.status if entry is not None else None), importing():
            from zerotop.tui.app import ZerotopApp
            from zerotop.tui.terminal import run_app

            find_earlier = None
            if entry is not None:
                from zerotop.source.earlier import earlier_finder

                find_earlier = earlier_finder(entry)
            app = ZerotopApp(source, read_only=read_only, find_earlier=find_earlier, host=host)
        run_app(app)
    finally:
        source.close()
    if app.left_by == signal.SIGHUP:
        return 128 + app.left_by  # the terminal is going, or has gone
    status = source.state.status
    if status is None:
        return 0
    there = f"{host}:" if host else ""
    if status.state in LIVE_STATES:
        say(f"{status.name} continues ({status.state}): zerotop attach {there}{status.name} opens it again")
    else:
        say(f"{status.name}: {status.state}" + (f", {status.reason}" if status.reason else ""))
    if app.left_by is not None:
        return 128 + app.left_by
    return 1 if status.state in ("failed", "aborted") else 0
