"""zerotop replay: the screen of a run on its recording, and what can be taken out of a recording."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry
    from zerotop.source.replay import ReplaySource

_DESCRIPTION = """\
Open the recording of a run on the same screen as `attach`, with a time bar: space plays, [ and ] go a frame back and
on, { and } change the speed, j and k go ten seconds, g goes to a moment, . and , to the next and the previous event.

A MOMENT is a step (1200), a time of day (14:03 or 14:03:20), a time from the beginning (5m, 2h30m) or before the end
(-10m), a date and time (2026-11-30T14:03), a share (50%), start or end. One that begins with a dash: --at=-10m.

With --csv, --parquet, --svg, --png or --cast nothing is opened: a range or a picture is written to a file."""
_EPILOG = """\
examples:
  zerotop replay q1                                   play it from the beginning
  zerotop replay q1 --at=-10m --speed 4               the last ten minutes
  zerotop replay q1 --csv steps.csv                   every recorded step: loss, lr, norm, times
  zerotop replay q1 --csv ranks.csv --table ranks --from 14:00 --to 14:10
  zerotop replay q1 --png crash.png --at end --size 160x50
  zerotop replay q1 --cast q1.cast --from 1000 --to 2000 && asciinema play q1.cast"""
_DEFAULT_SIZE = "120x40"
CAST_S = 60.0
"""A cast without --speed lasts about this long at most."""


def register(subparsers: Any) -> None:
    """Add `replay` to the command line."""
    parser = subparsers.add_parser(
        "replay",
        help="play a run's recording, or export it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="default: the newest live run, else the newest")
    parser.add_argument("--at", metavar="MOMENT", help="where to begin; for a picture: what to show (default: end)")
    parser.add_argument("--play", action="store_true", help="begin to play at once")
    parser.add_argument("--speed", type=float, metavar="N", help="recorded seconds per second: 0.25 to 600")
    parser.add_argument("--from", dest="from_", metavar="MOMENT", help="beginning of what is exported; default: start")
    parser.add_argument("--to", metavar="MOMENT", help="its end; default: end")
    parser.add_argument("--csv", metavar="FILE", help="write a table as CSV; - writes to stdout")
    parser.add_argument("--parquet", metavar="FILE", help="write a table as Parquet (needs pyarrow)")
    parser.add_argument(
        "--table", choices=("steps", "ranks"), default="steps", help="a row per step (default), or per frame and rank"
    )
    parser.add_argument("--svg", metavar="FILE", help="write a picture of the screen at --at")
    parser.add_argument("--png", metavar="FILE", help="the same as PNG (needs rsvg-convert or inkscape)")
    parser.add_argument("--cast", metavar="FILE", help="write an asciinema cast of the screen from --from to --to")
    parser.add_argument(
        "--size", default=_DEFAULT_SIZE, metavar="WxH", help=f"of pictures and casts; default: {_DEFAULT_SIZE}"
    )
    parser.add_argument("--json", action="store_true", help="print what the recording holds, and what was written")


def run(arguments: argparse.Namespace) -> int:
    """Open the replay, or write what was asked for."""
    from zerotop.output import CommandError, can_draw, print_json
    from zerotop.rundir.directory import find_any_run
    from zerotop.source.replay import SPEEDS, ReplaySource
    from zerotop.source.target import parse_target

    target = parse_target(arguments.run)
    if target.host is not None:
        words = f"zerotop replay {target.run or ''}".strip()
        raise CommandError(f"a replay reads the recording where it is: ssh -t {target.host} {words}")
    entry = find_any_run(target.run)
    size = _size(arguments.size)
    if arguments.speed is not None and not SPEEDS[0] <= arguments.speed <= SPEEDS[-1]:
        raise CommandError(f"--speed: expected {SPEEDS[0]:g} to {SPEEDS[-1]:g}, got {arguments.speed:g}")
    asked = [name for name in ("csv", "parquet", "svg", "png", "cast") if getattr(arguments, name)]
    if arguments.csv == "-" and arguments.json:
        raise CommandError("--csv - and --json both write to stdout: name a file for the table")
    if not asked and not arguments.json and not can_draw():
        raise CommandError("replay draws a screen and needs a terminal; without one: --json, --csv, --svg, --cast")
    source = ReplaySource(entry.path, entry.name)
    with contextlib.closing(source):
        source.start()
        span = (_moment(source, "--from", arguments.from_, "start"), _moment(source, "--to", arguments.to, "end"))
        if span[1] < span[0]:
            raise CommandError(f"--to {arguments.to} is before --from {arguments.from_ or 'start'}")
        at_s = _moment(source, "--at", arguments.at, "end" if asked else "start")
        if not asked and not arguments.json:
            return _play(source, at_s, arguments)
        written = [_write(name, Path(getattr(arguments, name)), source, span, at_s, size, arguments) for name in asked]
        if arguments.json:
            print_json({**_document(source, entry.path), "written": written})
    return 0


def play(entry: RunEntry) -> int:
    """The replay of a run from its beginning, until the user leaves it. Raises SourceError."""
    from zerotop.source.replay import ReplaySource
    from zerotop.tui.replay import ReplayApp
    from zerotop.tui.terminal import run_app

    source = ReplaySource(entry.path, entry.name)
    with contextlib.closing(source):
        source.start()
        app = ReplayApp(source)
        run_app(app)
    return 0 if app.left_by is None else 128 + app.left_by


def _play(source: ReplaySource, at_s: float, arguments: argparse.Namespace) -> int:
    from zerotop.output import say
    from zerotop.tui.replay import ReplayApp
    from zerotop.tui.terminal import run_app

    source.go_to(at_s)
    if arguments.speed is not None:
        source.set_speed(arguments.speed)
    if arguments.play:
        source.toggle()
    app = ReplayApp(source)
    run_app(app)
    if app.left_by is not None:
        return 128 + app.left_by
    say(f"left the replay of {source.name} at step {source.state.step}")
    return 0


def _size(text: str) -> tuple[int, int]:
    from zerotop.output import CommandError

    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and 20 <= int(width) <= 500 and 10 <= int(height) <= 200):
        raise CommandError(f"--size: expected columns x lines, 20x10 to 500x200, such as 120x40, got {text!r}")
    return int(width), int(height)


def _moment(source: ReplaySource, option: str, text: str | None, default: str) -> float:
    from zerotop.output import CommandError
    from zerotop.recording.moments import MomentError, parse_moment

    try:
        return parse_moment(text if text is not None else default, source.extent())
    except MomentError as error:
        raise CommandError(f"{option}: {error}") from None


# ---- exports ---------------------------------------------------------------------------------------------------------
def _write(
    name: str,
    target: Path,
    source: ReplaySource,
    span: tuple[float, float],
    at_s: float,
    size: tuple[int, int],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    from zerotop.output import CommandError, say
    from zerotop.rundir.paths import error_text

    try:
        if name in ("csv", "parquet"):
            return _write_table(name, target, source, span, arguments.table)
        from zerotop.tui.filming import save_cast, save_picture

        if name == "cast":
            speed = arguments.speed or max(1.0, (span[1] - span[0]) / CAST_S)
            with _progress(f"drawing {target}") as tell:
                pictures = save_cast(source, span, target, size, speed, tell)
            say(f"{target}: {pictures} pictures")
            return {"file": str(target), "pictures": pictures, "speed": speed}
        if target.suffix.lower() != f".{name}":
            raise CommandError(f"--{name} {target}: expected a file that ends with .{name}")
        save_picture(source, at_s, target, size)
        say(f"{target}: the screen at step {source.state.step}")
        return {"file": str(target), "step": source.state.step}
    except BrokenPipeError:
        raise  # the reader of --csv - has seen enough
    except OSError as error:
        raise CommandError(f"can't write {target}: {error_text(error)}") from None


def _write_table(
    form: str, target: Path, source: ReplaySource, span: tuple[float, float], table: str
) -> dict[str, Any]:
    import csv
    import io
    import os
    import subprocess

    from zerotop.launch.child import child_process
    from zerotop.launch.torchrun import with_import_path
    from zerotop.output import CommandError, say
    from zerotop.recording.tables import ranks_table, steps_table

    columns, rows = (steps_table if table == "steps" else ranks_table)(source.playback, *span)
    count = 0
    with contextlib.ExitStack() as closing:
        out: TextIO
        child = None
        if form == "parquet":
            words = [sys.executable, "-P", "-m", "runtime.data.parquet_table", str(target)]
            environment = with_import_path(dict(os.environ))
            child = closing.enter_context(child_process(words, environment, stdin=subprocess.PIPE))
            assert child.stdin is not None
            out = io.TextIOWrapper(child.stdin, "utf-8", newline="")
        elif str(target) == "-":
            out = sys.stdout
        else:
            out = closing.enter_context(target.open("w", encoding="utf-8", newline=""))
        writer = csv.writer(out)
        with _progress(f"writing {target}") as tell, contextlib.suppress(*([BrokenPipeError] if child else [])):
            writer.writerow(columns)
            for row in rows:
                writer.writerow(["" if value is None else value for value in row])
                count += 1
                if count % 1000 == 0:
                    tell((row[0] - span[0]) / max(1e-9, span[1] - span[0]))
        if child is not None:
            with contextlib.suppress(BrokenPipeError):
                out.close()
            assert child.stdout is not None
            said = child.stdout.read().decode(errors="replace").strip()
            if child.wait():
                raise CommandError(said or f"{target} was not written: see the error above", exit_code=1)
    say(f"{target}: {count:,} rows")
    return {"file": str(target), "table": table, "rows": count}


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A function that takes the share that is done, and says it once a second."""
    import time

    from zerotop.output import say

    said_s = time.monotonic()

    def tell(share: float) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= 1.0:
            said_s = time.monotonic()
            say(f"{what}: {min(1.0, max(0.0, share)):.0%}")

    yield tell


def _document(source: ReplaySource, path: Path) -> dict[str, Any]:
    frames = source.playback.frames
    recording = path / "recording.sqlite"
    severities = [mark.severity for mark in source.marks]
    return {
        "name": source.name,
        "begin_wall_s": frames.begin_s,
        "end_wall_s": frames.end_s,
        "frames": frames.count,
        "stretches": [
            {"begin_wall_s": one.begin_s, "end_wall_s": one.end_s, "spacing_s": one.spacing_s, "frames": one.count}
            for one in frames.stretches
        ],
        "events": len(severities),
        "warnings": severities.count("warning"),
        "errors": severities.count("error"),
        "bytes": recording.stat().st_size,
    }
