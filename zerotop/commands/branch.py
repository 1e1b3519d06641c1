"""zerotop branch: a new run from a checkpoint of another one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry

_DESCRIPTION = """\
Start a new run from a checkpoint of RUN, which may be live, paused or over, and goes on as it is. The new run has RUN's
config with what --set changes, continues at the checkpoint's step with its optimizer states, random states and place in
the data, and shows the curve of RUN up to there. The checkpoint is shared on disk until one of the two deletes it.
Model, data, seed, optimizer type and global batch stay as they are.

On a terminal both curves are then shown on one screen (`zerotop compare RUN NEW --watch`)."""
_EPILOG = """\
examples:
  zerotop branch q1 --set optimizer.params.lr=1e-4              from its newest checkpoint
  zerotop branch q1@2000 --set optimizer.params.lr=1e-4 --name q1-slow --detach
  zerotop compare q1 q1-slow                                    which one does better"""


def register(subparsers: Any) -> None:
    """Add `branch` to the command line."""
    parser = subparsers.add_parser(
        "branch",
        help="start a new run from a checkpoint of another one",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN[@STEP]", help="default STEP: that of its newest complete checkpoint")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one key of the config, such as optimizer.params.lr=1e-4; may be repeated",
    )
    parser.add_argument("--name", help="name of the new run; default: that of RUN with a number")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks; default: as RUN")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: as RUN")
    parser.add_argument("--detach", action="store_true", help="return as soon as the ranks train")
    parser.add_argument("--no-screen", action="store_true", help="print progress lines instead of drawing a screen")
    parser.add_argument("--json", action="store_true", help="print the new run's state as one JSON document when done")


def run(arguments: argparse.Namespace) -> int:
    """Start the branch and follow it as asked."""
    from zerotop.commands.launch import accompany
    from zerotop.launch.branching import find_branch
    from zerotop.launch.start import start_run
    from zerotop.rundir.directory import find_run

    name, step = _place(arguments.run)
    branch = find_branch(find_run(name), step)
    entry = start_run(
        None,
        nproc=arguments.nproc,
        device=arguments.device,
        name=arguments.name or _free_name(name),
        overrides=arguments.overrides,
        branch=branch,
    )
    return accompany(entry, arguments, lambda: _watch(branch.parent, entry))


def _watch(parent: RunEntry, entry: RunEntry) -> int:
    from zerotop.commands.compare import watch

    return watch(parent, entry)


def _place(text: str) -> tuple[str, int | None]:
    from zerotop.output import CommandError

    name, at, step = text.rpartition("@")
    if not at:
        return text, None
    if not step.isdecimal() or not name:
        raise CommandError(f"{text!r}: expected RUN or RUN@STEP, such as q1@2000")
    return name, int(step)


def _free_name(parent: str) -> str:
    from zerotop.rundir.directory import runs_home

    number = 2
    while (runs_home() / f"{parent}-{number}").exists():
        number += 1
    return f"{parent}-{number}"
