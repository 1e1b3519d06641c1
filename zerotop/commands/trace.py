"""zerotop trace: the recorded phases and collectives of a run as a trace for Perfetto, also after its end."""

from __future__ import annotations

import argparse
import re
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry
    from zerotop.trace.export import Exported
    from zerotop.trace.recorded import Window

DEFAULT_LAST = "5m"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DESCRIPTION = """\
Write the steps, phases and collectives of every rank, and the events of the run, as one trace file that
https://ui.perfetto.dev and chrome://tracing open. It comes from the recording, so the run may be live, have ended or
have crashed. The last ten minutes are complete; of earlier steps there are samples of each rank. What
happens inside of the phases is shown by `zerotop profile`."""


def register(subparsers: Any) -> None:
    """Add `trace` to the command line."""
    parser = subparsers.add_parser(
        "trace", help="export the timeline of the last minutes for Perfetto", description=_DESCRIPTION
    )
    parser.usage = "%(prog)s [RUN [OUT]] [--last TIME | --steps A:B] [--json]"
    parser.add_argument("target", nargs="?", metavar="RUN", help="a run of this machine; default: the newest one")
    parser.add_argument(
        "out", nargs="?", metavar="OUT", help="a file, .json or .json.gz; default: RUN-trace.json.gz; -: stdout"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--last", metavar="TIME", help=f"the last seconds, minutes or hours: 30s, 5m, 1h; default: {DEFAULT_LAST}"
    )
    which.add_argument("--steps", metavar="A:B", help="the optimizer steps from A to B, both included")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Export the timeline. Raises CommandError."""
    from zerotop.output import CommandError, print_json, say, show
    from zerotop.rundir.directory import find_run
    from zerotop.source.target import parse_target

    last_s, steps = _last(arguments.last), _steps(arguments.steps)
    target = parse_target(arguments.target)
    if target.host:
        where = f"ssh {target.host} zerotop trace {target.run or ''}".rstrip()
        raise CommandError(f"trace reads the run directory of this machine; try: {where} - > trace.json.gz")
    to_stdout = arguments.out == "-"
    if to_stdout and (arguments.json or sys.stdout.isatty()):
        raise CommandError("trace -: expected a pipe or a file as standard output, and no --json")
    entry = find_run(target.run)
    path = Path(arguments.out) if arguments.out and not to_stdout else Path(f"{entry.name}-trace.json.gz")
    if not to_stdout and path.is_dir():
        path = path / f"{entry.name}-trace.json.gz"
    try:
        written = _export(entry, last_s, steps, None if to_stdout else path)
    except (OSError, sqlite3.Error) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"trace: {getattr(error, 'filename', None) or entry.path}: {problem}", exit_code=1) from None
    if to_stdout:
        return 0
    document = {"run": entry.name, "path": str(path), "bytes": path.stat().st_size, **written._asdict()}
    if arguments.json:
        print_json(document)
    else:
        say(_text(entry.name, written))
        show(str(path))
    return 0


def _export(entry: RunEntry, last_s: float, steps: tuple[int, int] | None, path: Path | None) -> Exported:
    from zerotop.output import CommandError
    from zerotop.trace.export import export_timeline
    from zerotop.trace.recorded import RecordedTimeline, Window
    from zerotop.trace.writer import compressed, trace_file

    try:
        opened = RecordedTimeline(entry.path)
    except FileNotFoundError:
        raise CommandError(f"{entry.name} has no recording, so there is no timeline", exit_code=1) from None
    with opened as timeline:
        end = timeline.end_wall_s
        if end is None:
            raise CommandError(f"the recording of {entry.name} has no phases yet", exit_code=1)
        window = Window(end - last_s) if steps is None else Window(0.0, *steps)
        _check_steps(entry.name, timeline, window)
        if path is None:
            with compressed(sys.stdout.buffer) as stream:
                return export_timeline(entry.run, timeline, window, stream)
        with trace_file(path) as file:
            return export_timeline(entry.run, timeline, window, file)


def _check_steps(name: str, timeline: Any, window: Window) -> None:
    """Raises CommandError if the recording has none of the steps that were asked for."""
    from zerotop.output import CommandError
    from zerotop.trace.recorded import Window

    if window.first is None or any(timeline.read(rank, window)[0] for rank in timeline.ranks[:1]):
        return
    known = [phase.step for phase in timeline.read(timeline.ranks[0], Window())[0]] if timeline.ranks else []
    there = f"it has steps {min(known)} to {max(known)}" if known else "it has none"
    raise CommandError(f"trace: the recording of {name} has no step from {window.first} to {window.last}: {there}", 1)


def _text(name: str, written: Exported) -> str:
    span = f"steps {written.first_step} to {written.last_step}" if written.first_step is not None else "no steps"
    ranks = f"{written.ranks} rank{'s' * (written.ranks != 1)}"
    gaps = "" if written.complete else "; of the older steps there are samples, so there are gaps"
    return f"{name}: {span} of {ranks}{gaps}. Open the file at https://ui.perfetto.dev:"


def _last(text: str | None) -> float:
    """--last in seconds."""
    from zerotop.output import CommandError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text or DEFAULT_LAST)
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if not 0 < seconds < 1e9:
        raise CommandError(f"--last: expected a time above 0 such as 30s, 5m or 1h, got {text!r}")
    return seconds


def _steps(text: str | None) -> tuple[int, int] | None:
    """--steps as (first, last)."""
    from zerotop.output import CommandError

    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise CommandError(f"--steps: expected A:B with A not above B, such as 100:120, got {text!r}")
    return int(found[1]), int(found[2])
