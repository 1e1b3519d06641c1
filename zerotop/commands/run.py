"""zerotop run: any command as a run: watched, logged by rank, restarted if asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.wire.watchlines import WATCH_LINES
from zerotop.clean import clean
from zerotop.rundir.logs import LogTail

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry

_DESCRIPTION = """\
Run a training command (torchrun, accelerate launch, deepspeed, srun, python) as a run of zerotop: with its screen, logs
by rank, GPU and host memory, stacks on demand and verdicts on hangs. Nothing in the script has to change for that. With
one line in it (below) the screen also shows steps, phases, loss and memory by use, and the run obeys pause,
checkpoint and stop.

The run is detached from this terminal from its first moment: leaving the screen (q) or losing the connection never
touches it. Without a terminal, or with --no-screen, the command's own output is printed, and the exit code is the
command's. There Ctrl-C and SIGTERM ask the run to stop: its trainer if it can, else the command by SIGTERM.

A command that fails is not started again, unless zerotop.restarts.limit says how often: it starts from its beginning,
and its script decides from which checkpoint it continues."""
_EPILOG = """\
examples:
  zerotop run python train.py --lr 3e-4
  zerotop run torchrun --nproc-per-node 8 train.py
  zerotop run accelerate launch train.py
  zerotop run --nproc 8 train.py          torchrun with 8 ranks of train.py
  zerotop run --set zerotop.restarts.limit=3 -- deepspeed train.py"""
_LINES = "the line, which does nothing outside a run:\n" + "\n".join(
    f"  {trainer}:\n    {line}" for trainer, (line, _) in WATCH_LINES.items()
)


def register(subparsers: Any) -> None:
    """Add `run` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="run any training command and watch it",
        usage="%(prog)s [options] [--] COMMAND...",
        description=_DESCRIPTION,
        epilog=f"{_LINES}\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks of a Python script with torchrun")
    parser.add_argument("--name", help="name of the run; default: two words")
    parser.add_argument("--config", metavar="FILE", help='JSON file with a section "zerotop": restarts, telemetry')
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="one key of that section, such as zerotop.restarts.limit=3; may be repeated",
    )
    parser.add_argument(
        "--as-deepspeed",
        action="store_true",
        help="`import deepspeed` in the script gives zerotop's engine, also to accelerate and transformers",
    )
    parser.add_argument("--detach", action="store_true", help="return as soon as the command runs")
    parser.add_argument("--no-screen", action="store_true", help="print its output instead of drawing the screen")
    parser.add_argument("command_words", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Start the command and follow it as asked."""
    from zerotop.launch.start import start_wrapped
    from zerotop.output import say
    from zerotop.source.opening import open_source

    words = arguments.command_words
    entry = start_wrapped(
        words[1:] if words[:1] == ["--"] else words,
        nproc=arguments.nproc,
        name=arguments.name,
        config_path=arguments.config,
        overrides=arguments.overrides,
        as_deepspeed=arguments.as_deepspeed,
    )
    if arguments.detach:
        say(f"{entry.name} runs, in {entry.path}")
        say(f"zerotop attach {entry.name} opens the screen on it; zerotop stop {entry.name} ends it")
        return 0
    if arguments.no_screen or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from zerotop.commands.progress import follow

        follow(open_source(entry), entry, output=OutputPrinter(entry))
        return _exit_code(entry)

    from zerotop.commands.attach import show

    return show(open_source(entry), entry=entry)


def _exit_code(entry: RunEntry) -> int:
    """The command's, as a shell gives it; 0 if it was stopped on request."""
    from zerotop.rundir.directory import read_entry

    status = read_entry(entry.path).status
    if status.state in ("finished", "stopped"):
        return 0
    code = status.exit_code or 1
    return code if code > 0 else 128 - code


class OutputPrinter:
    """What the command and rank 0 have written since the last call: as it is to a pipe, without control characters to a
    terminal."""

    def __init__(self, entry: RunEntry) -> None:
        self._entry = entry
        self._attempt = entry.run.attempt
        self._tails: dict[str, LogTail] = {}
        self._tidy: Callable[[str], str] = clean if sys.stdout.isatty() else str

    def __call__(self, at_end: bool) -> None:
        from zerotop.rundir.logs import newest_attempt

        newest = int(newest_attempt(self._entry).name)
        while self._attempt < newest:  # its processes are gone: nothing more comes
            self._print_new(at_end=True)
            self._attempt += 1
        self._print_new(at_end)
        sys.stdout.flush()

    def _print_new(self, at_end: bool) -> None:
        for name in ("launcher.log", "rank-0.log"):
            path = self._entry.logs(self._attempt) / name
            if not path.exists():
                continue
            for line in self._tails.setdefault(str(path), LogTail(path)).new_lines(at_end=at_end):
                print(self._tidy(line))
