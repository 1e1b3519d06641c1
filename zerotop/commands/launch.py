"""zerotop launch: start a run, then open the screen on it, or print progress lines, or return."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry
    from zerotop.state.run import RunState

STUCK_S = 60.0
"""Ranks of one run report within seconds of each other: for one that is missing for so long after the last that did,
--detach does not wait."""
TOLD_FIRST_S, CHANGED_S, TOLD_AGAIN_S = 1.0, 5.0, 30.0
"""Seconds after which --detach says where a start stands: at first, when that changes, and when it doesn't."""

_DESCRIPTION = """\
Start a run of a DeepSpeed-style JSON config and open the live screen on it. The run is detached from this terminal from
its first moment: leaving the screen (q), closing the terminal or losing the connection never touches it.

Without a terminal, or with --no-screen, progress lines are printed and the exit code is the run's: 0 finished or
stopped, 1 failed or aborted. There Ctrl-C asks the run to stop after a checkpoint, and a second one aborts it; SIGTERM
and SIGUSR1, as a batch system sends them before it ends a job, ask for the same stop."""


def register(subparsers: Any) -> None:
    """Add `launch` to the command line."""
    parser = subparsers.add_parser(
        "launch",
        help="start a run",
        usage="%(prog)s CONFIG [options] [-- SCRIPT.py ARGS...]",
        description=_DESCRIPTION,
        epilog="-- SCRIPT.py ARGS...  train with a script of your own (import runtime as deepspeed) on every rank",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="JSON file; with --resume the run's own by default")
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks; default: one per GPU, on the CPU 2, or 1 where the batch sizes ask for it",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--name", help="name of the run; default: two words")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one key of the config, such as zerotop.train.steps=50; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="continue run --name from its newest complete checkpoint")
    parser.add_argument(
        "--as-deepspeed",
        action="store_true",
        help="`import deepspeed` in the script gives zerotop's engine, also to accelerate and transformers",
    )
    parser.add_argument(
        "--detach", action="store_true", help="return as soon as the ranks train, or once some of them fail to report"
    )
    parser.add_argument("--no-screen", action="store_true", help="print progress lines instead of drawing the screen")
    parser.add_argument("--json", action="store_true", help="print the run's state as one JSON document when done")


def run(arguments: argparse.Namespace) -> int:
    """Start the run and follow it as asked."""
    from zerotop.launch.start import start_run
    from zerotop.output import CommandError
    from zerotop.source.opening import open_source

    if arguments.script == []:
        raise CommandError("after -- comes a script: zerotop launch CONFIG -- SCRIPT.py ARGS...")
    entry = start_run(
        arguments.config,
        nproc=arguments.nproc,
        device=arguments.device,
        name=arguments.name,
        overrides=arguments.overrides,
        resume=arguments.resume,
        script=arguments.script,
        as_deepspeed=arguments.as_deepspeed,
    )
    from zerotop.commands.attach import show

    return accompany(entry, arguments, lambda: show(open_source(entry), entry=entry))


def accompany(entry: RunEntry, arguments: argparse.Namespace, draw: Callable[[], int]) -> int:
    """Stay with a run that has just been started, as --detach, --no-screen and --json ask; `draw` opens the screen on
    it. Returns the exit code."""
    from zerotop.output import say
    from zerotop.source.opening import open_source

    plain = arguments.no_screen or arguments.json or not (sys.stdin.isatty() and sys.stdout.isatty())
    if arguments.detach or plain:
        say(first_words(entry))
    if arguments.detach:
        return _detached(entry, arguments.json)
    if plain:
        from zerotop.commands.progress import follow

        return follow(open_source(entry), entry, as_json=arguments.json)
    return draw()


def _detached(entry: RunEntry, as_json: bool) -> int:
    """Return when the ranks train, with their error if they never did, or when some do not even report. Ctrl-C leaves
    the run alone, too."""
    from runtime.wire.messages import LIVE_STATES
    from zerotop.documents import status_document
    from zerotop.output import print_json, say
    from zerotop.rundir.directory import read_entry
    from zerotop.source.opening import open_source

    source, start = open_source(entry), _Start(entry.name, time.monotonic())
    try:
        while source.state.state_name == "starting" and source.connection != "ended":
            source.wait(0.5)
            source.poll()
            for line in start.look(source.state, time.monotonic()):
                say(line)
            if start.stuck:
                break
    except KeyboardInterrupt:
        say(f"{entry.name} continues to start")
    finally:
        state = source.state
        source.close()
    entry = read_entry(entry.path)
    if as_json:
        print_json(status_document(state, entry))
    if entry.status.state not in LIVE_STATES and entry.status.state not in ("finished", "stopped"):
        say(f"{entry.name} {entry.status.state}: {entry.status.reason}\n{entry.status.error}".rstrip())
        return 1
    say(f"zerotop attach {entry.name} opens the screen on it; zerotop stop {entry.name} ends it")
    return 0


class _Start:
    """Follows the start of a run that nobody watches, and says when it is stuck."""

    def __init__(self, name: str, now_s: float) -> None:
        self.stuck = False
        """Whether some ranks have not reported though the last one that did has done so long ago."""
        self._name = name
        self._reported: set[int] = set()
        self._told, self._told_s = "", now_s
        self._began_s = self._news_s = now_s

    def look(self, state: RunState, now_s: float) -> list[str]:
        """The lines to print at `now_s`, a monotonic clock."""
        from zerotop.format import duration_text
        from zerotop.state.condition import unreported_ranks

        if state.state_name != "starting":
            return []
        reported = {number for number, rank in state.ranks.items() if rank.hello is not None}
        if reported - self._reported:
            self._reported, self._news_s = reported, now_s
        lines, verdict, took_s = [], state.verdict, now_s - self._began_s
        told = verdict.text if verdict is not None and verdict.what == "starting" else ""
        due_s = TOLD_FIRST_S if not self._told else CHANGED_S if told not in ("", self._told) else TOLD_AGAIN_S
        if now_s - self._told_s >= due_s:
            what = told or "the ranks are starting"
            lines.append(f"{self._name}: {what} ({duration_text(took_s)})")
            self._told, self._told_s = what, now_s
        if unreported_ranks(state) and now_s - self._news_s >= STUCK_S:
            self.stuck = True
            lines.append(
                f"{self._name} is still starting after {duration_text(took_s)}, and is left to it: `zerotop stacks "
                f"{self._name}` shows where its ranks are, `zerotop logs {self._name}` what they have printed"
            )
        return lines


def first_words(entry: RunEntry) -> str:
    """What was started, and the notes on its config."""
    from zerotop.launch.start import read_notes

    run = entry.run
    ranks = f"{run.nproc} rank{'s' * (run.nproc > 1)} on {'the CPU' if run.device == 'cpu' else run.device}"
    attempt = f", attempt {run.attempt}" if run.attempt > 1 else ""
    notes = [f"  {note['text']}" for note in read_notes(entry)]
    return "\n".join([f"{entry.name}: {ranks}{attempt}, in {entry.path}", *notes])
