"""zerotop pause, resume, checkpoint, set, stop, abort, stacks, profile, snapshot: send one command to a run's hub and
wait for its answer."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from runtime.wire.bounds import MOST_SNAPSHOT_STEPS

if TYPE_CHECKING:
    from runtime.wire.messages import CommandRecord
    from zerotop.source.target import Target

NAMES = ("pause", "resume", "checkpoint", "set", "stop", "abort", "stacks", "profile", "snapshot")
_WIRE_NAMES = {"snapshot": "memory-snapshot"}
"""Commands whose name in messages differs."""
DEFAULT_TIMEOUT_S = 60.0
_DOES = {
    "pause": "Pause the run at the next step boundary, on all ranks at once. Checkpoint and stop still work.",
    "resume": "Resume a paused run.",
    "checkpoint": "Write a checkpoint at the next step boundary.",
    "set": "Change a setting of the running run at the next step boundary.",
    "stop": "End the run after the current step and a last checkpoint; launch --resume continues it. A command of "
    "`zerotop run` ends as its trainer can, with a checkpoint if that can save; else it is sent SIGTERM.",
    "abort": "End the run at once, without a checkpoint: steps since the last checkpoint are lost.",
    "stacks": "Dump the Python stacks of all ranks, also of a run that is stuck or paused, with a verdict on what they "
    "wait for. The run is not disturbed.",
    "profile": "Profile the next optimizer steps of some ranks with torch.profiler while the run goes on. Their "
    "traces, and the run's own phases and collectives, become one file in the run directory for "
    "https://ui.perfetto.dev; an event names it. The profiled steps are slower.",
    "snapshot": "Record the memory of all ranks during the next optimizer step, and write into the run directory what "
    "it is used for: by category, unit and tensor; on GPUs also a file for https://pytorch.org/memory_viz.",
}
_SAYS = {
    "stop": "{name} finishes its current step, writes a checkpoint and ends; launch --resume continues it",
    "abort": "{name} ends at once, without a checkpoint",
}
_STOPS_WRAPPED = "{name} is asked to stop: its trainer if that can be asked, else the command gets SIGTERM"


def register(subparsers: Any) -> None:
    """Add the commands to the command line."""
    for name in NAMES:
        parser = subparsers.add_parser(name, help=_DOES[name], description=_DOES[name])
        if name == "set":
            from runtime.config.knobs import KNOBS

            width = max(len(knob) for knob in KNOBS)
            parser.formatter_class = argparse.RawDescriptionHelpFormatter
            parser.epilog = "settings:\n" + "\n".join(
                f"  {knob.name:<{width}}  {knob.description} ({knob.allowed})" for knob in KNOBS.values()
            )
            parser.usage = "%(prog)s [options] [RUN] KEY=VALUE ..."
            parser.add_argument("words", nargs="+", metavar="[RUN] KEY=VALUE", help="one or more settings; see below")
        else:
            parser.add_argument(
                "target", nargs="?", metavar="RUN", help="a run, or user@host[:run]; default: the newest live run"
            )
        if name == "pause":
            parser.add_argument(
                "--release",
                action="store_true",
                help="also move everything to host memory and give the GPU memory back; resume brings it back",
            )
        if name == "stacks":
            parser.add_argument(
                "--rank", type=_rank, action="append", metavar="R", help="only this rank; may be given several times"
            )
            parser.add_argument(
                "--native",
                action="store_true",
                help="with C frames, for which py-spy stops each process for up to some seconds; a run that stands "
                "still is always read so",
            )
        if name == "checkpoint":
            parser.add_argument(
                "--wait", action="store_true", help="return when it is complete on disk, not when it is accepted"
            )
        if name == "snapshot":
            parser.add_argument("--steps", type=_step_count, metavar="N", help="record N optimizer steps; default: 1")
        if name == "abort":
            parser.add_argument(
                "--yes", "-y", action="store_true", help="do not ask; needed, with RUN, without a terminal"
            )
        if name == "profile":
            from zerotop.commands.profile import add_options

            add_options(parser)
        waits = "none" if name == "checkpoint" else f"{DEFAULT_TIMEOUT_S:.0f}"
        parser.add_argument(
            "--timeout",
            type=_seconds,
            metavar="SECONDS",
            help=f"how long to wait until it is applied; default: {waits}",
        )
        parser.add_argument("--json", action="store_true", help="print the answer as one JSON document")


def _step_count(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= MOST_SNAPSHOT_STEPS:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 to {MOST_SNAPSHOT_STEPS}, got {text!r}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a rank, a whole number from 0, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Send the command; the exit code is 1 if it was rejected or not applied in time."""
    from zerotop.output import CommandError, say
    from zerotop.source.target import parse_target

    name: str = arguments.command
    text, settings = _split_words(arguments.words) if name == "set" else (arguments.target, dict[str, Any]())
    target = parse_target(text)
    if name == "abort":
        _check_abort(target, arguments.yes)
    if target.host:
        if name == "abort" and not arguments.yes and not _confirmed(f"{target.host}:{target.run}"):
            say("zerotop: not sent")
            return 1
        return _run_there(target.host, target, arguments, settings)

    from zerotop.rundir.directory import find_run
    from zerotop.source.opening import open_source

    entry = find_run(target.run)
    if not entry.live:
        reason = f": {entry.status.reason}" if entry.status.reason else ""
        raise CommandError(
            f"{entry.name} has ended ({entry.status.state}{reason}): there is nothing to {name}", exit_code=1
        )

    if name == "abort" and not arguments.yes and not _confirmed(entry.name):
        say("zerotop: not sent")
        return 1

    from zerotop.source.command_answers import ask, new_command, refused

    own: dict[str, Any] = {"release": True} if getattr(arguments, "release", False) else {}
    if name == "profile":
        from zerotop.commands.profile import profile_arguments

        own = profile_arguments(arguments.steps, arguments.ranks, entry.run.nproc)
    elif name == "snapshot" and arguments.steps is not None:
        own = {"steps": arguments.steps}
    elif name == "stacks":
        own = ({"ranks": sorted(set(arguments.rank))} if arguments.rank else {}) | (
            {"native": True} if arguments.native else {}
        )
    command = new_command(_WIRE_NAMES.get(name, name), own or settings)
    if name == "set":
        problem = _check(settings)
        if problem:
            return _print(entry.name, refused(new_command(name, _as_typed(settings)), problem), arguments.json)
        command = new_command(name, _values(settings))
    if name in _SAYS:
        says = _STOPS_WRAPPED if name == "stop" and entry.run.wrapped else _SAYS[name]
        say(says.format(name=entry.name))
    accepted_is_enough = name == "checkpoint" and not arguments.wait
    timeout_s = arguments.timeout
    if timeout_s is None and not (name == "checkpoint" and arguments.wait):
        timeout_s = DEFAULT_TIMEOUT_S
    source = open_source(entry)
    try:
        record = ask(source, command, until="accepted" if accepted_is_enough else "applied", timeout_s=timeout_s)
        if name == "profile" and arguments.wait and record.ack.state == "applied":
            from zerotop.commands.profile import wait_for_file

            record = wait_for_file(source, record)
    finally:
        source.close()
    return _print(entry.name, record, arguments.json, accepted_is_enough)


def _split_words(words: list[str]) -> tuple[str | None, dict[str, str]]:
    """[RUN] KEY=VALUE...: the run, and the settings as typed."""
    from zerotop.output import CommandError

    run_text = None if "=" in words[0] else words[0]
    pairs = words if run_text is None else words[1:]
    if not pairs:
        raise CommandError(f"set {run_text}: expected KEY=VALUE after the run, such as log_interval=10")
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise CommandError(f"set: expected KEY=VALUE, such as log_interval=10, got {pair!r}")
        if key in settings:
            raise CommandError(f"set: {key} is given twice")
        settings[key] = value
    return run_text, settings


def _check(settings: dict[str, str]) -> str:
    """Why the settings are not allowed; empty if they are. The hub and the ranks check again."""
    from runtime.config.knobs import KnobError

    try:
        _values(settings)
    except KnobError as error:
        return str(error)
    return ""


def _values(settings: dict[str, str]) -> dict[str, Any]:
    from runtime.config.knobs import parse_knob

    return {key: parse_knob(key, value) for key, value in settings.items()}


def _as_typed(settings: dict[str, str]) -> dict[str, Any]:
    """Rejected settings for the record: numbers where they parse, like those of an accepted command."""
    return {key: _number(value) for key, value in settings.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text  # JSON has no NaN
    return text


def _confirmed(name: str) -> bool:
    """Ask, on a terminal: an abort can't be undone."""
    sys.stderr.write(f"Abort {name}? Steps since its last checkpoint are lost. [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _check_abort(target: Target, yes: bool) -> None:
    """Raises CommandError unless it is clear which run is meant, and that an abort is meant."""
    from zerotop.output import CommandError

    if target.host and not target.run:
        raise CommandError(f"abort can't be undone: name the run, zerotop abort {target.host}:RUN")
    if not (sys.stdin.isatty() and sys.stderr.isatty()) and not (yes and target.run):
        raise CommandError("abort can't be undone, and there is no terminal to ask on: zerotop abort RUN --yes")


def _run_there(host: str, target: Target, arguments: argparse.Namespace, settings: dict[str, str]) -> int:
    from zerotop.source.ssh import run_there

    words = [arguments.command]
    if target.run:
        words.append(target.run)
    words += [f"{key}={value}" for key, value in settings.items()]
    words += [f"--{flag}" for flag in ("wait", "release", "native") if getattr(arguments, flag, False)]
    words += [word for rank in getattr(arguments, "rank", None) or () for word in ("--rank", str(rank))]
    if getattr(arguments, "steps", None) is not None:
        words += ["--steps", str(arguments.steps)]
    if getattr(arguments, "ranks", None):
        words += ["--ranks", arguments.ranks]
    if arguments.command == "abort":
        words.append("--yes")
    if arguments.timeout is not None:
        words += ["--timeout", f"{arguments.timeout:g}"]
    if arguments.json:
        words.append("--json")
    return run_there(host, words)


def _print(name: str, record: CommandRecord, as_json: bool, accepted_is_enough: bool = False) -> int:
    from zerotop.documents import command_document
    from zerotop.output import print_json, say, show

    command, ack = record.command, record.ack
    done = ack.state == "applied" or (ack.state == "accepted" and accepted_is_enough)
    if as_json:
        print_json(command_document(record))
    if not done:
        say(f"zerotop: {name} {ack.state} {command.name}" + (f": {ack.reason}" if ack.reason else ""))
        return 1
    if command.name == "stacks" and not as_json:
        show(str(ack.result.get("text", "")).removesuffix("\n"))
        if ack.result.get("path"):
            say(f"saved in the run directory: {ack.result['path']}")
    elif not as_json:
        at = f" at step {ack.step}" if ack.step is not None else ""
        extras = "".join(f", {key} {value}" for key, value in ack.result.items())
        show(f"{name}: {command.name} {ack.state} as #{ack.number or command.number}{at}{extras}")
    return 0
