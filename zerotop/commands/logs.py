"""zerotop logs: what the ranks wrote, from the run directory; -f continues until the run ends."""

from __future__ import annotations

import argparse
import heapq
import re
import select
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from runtime.wire.rundir import LAUNCHER_LOG
from zerotop.clean import clean
from zerotop.output import say
from zerotop.rundir.logs import LogTail, newest_attempt

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry

POLL_S = 0.25
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?!\d)")
"""How the lines of logging begin, the ranks' own and most scripts'."""


def register(subparsers: Any) -> None:
    """Add `logs` to the command line."""
    parser = subparsers.add_parser(
        "logs",
        help="print what the ranks wrote",
        description="Print what the ranks of a run's newest attempt wrote to stdout and stderr: by time where "
        "lines begin with one, else rank by rank.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="RUN",
        help="a run, or user@host[:run]; default: the newest live run, else the newest",
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on with new lines until the run ends")
    parser.add_argument("--rank", type=_count, metavar="R", help="only this rank")
    parser.add_argument("-n", "--lines", type=_count, metavar="N", help="only the last N lines of each rank")
    parser.add_argument("--attempt", type=_count, metavar="A", help="an earlier attempt; default: the newest")
    parser.add_argument("--json", action="store_true", help="print one JSON list of {rank, line}")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Print the logs."""
    from zerotop.output import CommandError, print_json
    from zerotop.rundir.directory import find_any_run
    from zerotop.source.target import parse_target

    if arguments.follow and arguments.json:
        raise CommandError("--json is one document and -f has no end: use one of them")
    target = parse_target(arguments.target)
    if target.host:
        return _run_there(target.host, target.run, arguments)
    entry = find_any_run(target.run)
    tails = _tails(entry, arguments.rank, arguments.attempt)
    each = [_first_lines(tail, arguments.lines, at_end=not entry.live) for tail in tails]
    # Each is in order, and lines of one rank and time stay so.
    merged = ((rank, line) for _, rank, line in heapq.merge(*each, key=lambda entry: entry[:2]))
    if arguments.json:
        print_json([{"rank": number, "line": line} for number, line in merged])
        return 0
    _print(merged, len(tails) > 1)
    if arguments.follow and arguments.attempt is None:
        _follow(entry, arguments.rank, tails)
    return 0


def _run_there(host: str, name: str | None, arguments: argparse.Namespace) -> int:
    from zerotop.source.ssh import run_there

    words = ["logs", *([name] if name else [])]
    for flag in ("follow", "json"):
        words += [f"--{flag}"] if getattr(arguments, flag) else []
    for option in ("rank", "lines", "attempt"):
        value = getattr(arguments, option)
        words += [f"--{option}", str(value)] if value is not None else []
    return run_there(host, words)


def _tails(entry: RunEntry, rank: int | None, attempt: int | None) -> list[LogTail]:
    """The logs of one attempt, by rank. Raises CommandError when there are none to show."""
    from zerotop.output import CommandError

    folder = newest_attempt(entry) if attempt is None else entry.logs(attempt)
    paths = sorted(folder.glob("rank-*.log"), key=lambda path: int(path.stem.removeprefix("rank-")))
    if rank is not None:
        wanted = [path for path in paths if path.stem == f"rank-{rank}"]
        if paths and not wanted:
            there = ", ".join(path.stem.removeprefix("rank-") for path in paths)
            raise CommandError(f"{entry.name} has no rank {rank}: its ranks are {there}")
        paths = wanted
    if not paths and entry.run.wrapped and rank is None and (folder / LAUNCHER_LOG).exists():
        return [LogTail(folder / LAUNCHER_LOG)]  # a command without ranks
    if not paths:
        raise CommandError(f"{entry.name} ({entry.status.state}) has no logs in {folder}: its ranks have not started")
    return [LogTail(path) for path in paths]


def _first_lines(tail: LogTail, count: int | None, *, at_end: bool) -> Iterator[tuple[str, int, str]]:
    """(time, rank, line) of all lines, or of the last `count`."""
    if count is None:
        timed: Iterable[tuple[str, str]] = _timed(tail.all_lines(at_end=at_end))
    else:  # with what was read before them, whose times may be theirs
        found = list(_timed(tail.last_lines(count, at_end=at_end)))
        timed = found[len(found) - min(count, len(found)) :]
    return ((time, tail.rank, line) for time, line in timed)


def _timed(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each line with the time at the start of it, or of the last line before it that has one; "" before the first.

    The order of lines within a rank takes precedence over a clock that was set back.
    """
    newest = ""
    for line in lines:
        if match := _TIME.match(line):
            newest = max(newest, match[0].replace("T", " ").replace(",", "."))
        yield newest, line


def _print(lines: Iterable[tuple[int, str]], labelled: bool) -> None:
    """To a pipe what the ranks wrote, unchanged; to a terminal without what would control it."""
    tidy = clean if sys.stdout.isatty() else str
    for rank, line in lines:
        print(tidy(f"[{rank}] {line}" if labelled else line))
    sys.stdout.flush()


def _follow(entry: RunEntry, rank: int | None, tails: list[LogTail]) -> None:
    from zerotop.rundir.directory import read_entry

    for live in _ticks(entry):
        folder = newest_attempt(entry)
        if folder != tails[0].path.parent and any(folder.glob("rank-*.log")):
            tails = _tails(entry, rank, int(folder.name))
        for tail in tails:
            _print(((tail.rank, line) for line in tail.new_lines(at_end=not live)), len(tails) > 1)
    status = read_entry(entry.path).status
    say(f"zerotop: {entry.name} is over ({status.state})")


def _ticks(entry: RunEntry) -> Iterator[bool]:
    """Whether the run is live, every POLL_S, until it is not or our output is closed."""
    from zerotop.rundir.directory import read_entry

    gone = select.poll()
    gone.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always reported
    live = entry.live
    while live:
        if gone.poll(int(POLL_S * 1000)):
            raise BrokenPipeError
        live = read_entry(entry.path).live
        yield live
