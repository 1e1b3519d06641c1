"""zerotop compare: two runs beside each other, and whether one is better."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerotop.rundir.directory import RunEntry

_DESCRIPTION = """\
Compare run B with run A, each live or over: the loss by step, by time and by tokens, speed, memory, what differs in
their configs, and for each figure a verdict: better, worse, or within noise. docs/compare.md says what noise is.

With --gate the exit code is 1 if one of these figures is worse, or cannot be compared: for a CI job."""
_EPILOG = """\
examples:
  zerotop compare baseline q1                               a report
  zerotop compare baseline q1 --watch                       both curves on one screen, live
  zerotop compare baseline q1 --gate loss,speed --json      exit code 1 if the loss or the speed is worse
  zerotop compare baseline q1 --gate speed --tolerance speed=5%"""


def register(subparsers: Any) -> None:
    """Add `compare` to the command line."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two runs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="the run to compare with")
    parser.add_argument("b", metavar="B", help="the run that is judged")
    parser.add_argument("--watch", action="store_true", help="show both curves on a screen, as they grow")
    parser.add_argument("--gate", metavar="FIGURES", help="exit with 1 if one is worse: of loss, speed, memory")
    parser.add_argument(
        "--tolerance",
        action="append",
        default=[],
        metavar="FIGURE=SHARE",
        help="differences that count as none; default: loss=0.2%% speed=2%% memory=2%%",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the comparison, or show it."""
    from zerotop.compare.curves import read_curves
    from zerotop.compare.report import compare_runs, comparison_document, comparison_text, config_difference
    from zerotop.compare.verdicts import FIGURES
    from zerotop.output import CommandError, print_json, show
    from zerotop.rundir.directory import find_run

    gate = tuple(arguments.gate.split(",")) if arguments.gate else None
    for name in gate or ():
        if name not in FIGURES:
            raise CommandError(f"--gate: expected {', '.join(FIGURES)} or several of them with commas, got {name!r}")
    tolerances = dict(_tolerance(text) for text in arguments.tolerance)
    a, b = find_run(arguments.a), find_run(arguments.b)
    if a.path == b.path:
        raise CommandError(f"{a.name} and {b.name} are the same run: expected two")
    if arguments.watch:
        if arguments.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise CommandError("--watch draws a screen and needs a terminal; without it a report is printed")
        return watch(a, b)
    comparison = compare_runs(
        read_curves(a), read_curves(b), config_difference(a, b), gate or ("loss", "speed"), tolerances
    )
    if arguments.json:
        print_json(comparison_document(comparison))
    else:
        show(comparison_text(comparison))
    return 1 if gate and comparison.judgement in ("worse", "unknown") else 0


def watch(a: RunEntry, b: RunEntry) -> int:
    """The screen with both curves, until the user leaves it."""
    from runtime.wire.messages import LIVE_STATES
    from zerotop.output import say
    from zerotop.rundir.directory import read_entry
    from zerotop.tui.compare import CompareApp
    from zerotop.tui.terminal import run_app

    app = CompareApp(a, b)
    run_app(app)
    if app.left_by is not None:
        return 128 + app.left_by
    entry = read_entry(b.path)
    if entry.status.state in LIVE_STATES:
        say(f"{entry.name} continues ({entry.status.state}): zerotop attach {entry.name} opens it")
    return 0


def _tolerance(text: str) -> tuple[str, float]:
    from zerotop.compare.verdicts import FIGURES
    from zerotop.output import CommandError

    figure, _, share = text.partition("=")
    try:
        value = float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if figure not in FIGURES or not 0 <= value < 10:
        raise CommandError(f"--tolerance: expected FIGURE=SHARE, such as speed=5% ({', '.join(FIGURES)}), got {text!r}")
    return figure, value
