"""See the package: runs each file in a pytest of its own, and counts."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deepspeed_tests.applicable import FILES
from benchmarks.deepspeed_tests.execution import Choice, collect, run_file
from benchmarks.deepspeed_tests.outcomes import Outcome, Outcomes
from benchmarks.deepspeed_tests.reasons import unjudged
from benchmarks.deepspeed_tests.table import page


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    tests = arguments.checkout.resolve() / "tests"
    if not (tests / "unit" / "common.py").is_file():
        print(f"{arguments.checkout}: expected a checkout of DeepSpeed, with tests/unit in it", file=sys.stderr)
        return 2
    there = sorted(str(path.relative_to(tests / "unit")) for path in (tests / "unit").rglob("test_*.py"))
    for file in unjudged(file for file in there if file not in FILES):
        print(f"{file}: neither run nor left out with a reason", file=sys.stderr)
    outcomes = Outcomes(arguments.results)
    choice = Choice(arguments.sample, arguments.cases, arguments.only)
    chosen = [file for file in FILES if any(part in file for part in arguments.files)]
    for file in (file for file in chosen if file not in there):
        print(f"{file}: not in this checkout", file=sys.stderr)
    chosen = [file for file in chosen if file in there]
    if new := [file for file in chosen if file not in outcomes.names]:
        for file, names in collect(tests, new).items():
            outcomes.add_names(file, names)
    for file in chosen:
        known = {outcome.name for outcome in outcomes.of(file) if not _again(outcome, arguments.again)}
        wanted = [name for name in choice.of(outcomes.names[file]) if name not in known]
        fresh: Counter[str] = Counter()
        for outcome in run_file(tests, file, wanted, arguments.limit_s):
            outcomes.add(outcome)
            fresh[outcome.result] += 1
            if outcome.result == "failed" and not outcome.reason:
                print(f"  {outcome.name}: {_last_line(outcome.message)}", flush=True)
        print(f"{file}: {', '.join(f'{n} {r}' for r, n in sorted(fresh.items())) or 'nothing new'}", flush=True)
    text = page(
        outcomes.in_order(FILES),
        {file: outcomes.names[file] for file in FILES if file in outcomes.names},
        sys.argv[1:] if argv is None else argv,
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    return 0


def _again(outcome: Outcome, which: str) -> bool:
    if which == "unexplained":
        return outcome.result == "failed" and not outcome.reason
    return which == "all" or which == outcome.result


def _last_line(message: str) -> str:
    """The error of a traceback; of pytest's own reports the first line says more."""
    lines = [line for line in message.splitlines() if line.strip()] or ["no message"]
    return lines[0][:300]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deepspeed_tests")
    parser.add_argument("checkout", type=Path, help="folder with DeepSpeed's sources")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="at most N tests of each file, spread evenly"
    )
    parser.add_argument(
        "--cases", type=int, default=0, metavar="N", help="at most N of each test function, which differ in parameters"
    )
    parser.add_argument("--files", nargs="*", default=[""], metavar="PART", help="files with one of PART in their name")
    parser.add_argument("--only", default="", metavar="PART", help="tests with PART in their name")
    parser.add_argument("--limit-s", type=float, default=60, help="seconds that one test may take")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="JSONL",
        help="keeps every outcome as it comes; a test that has one there does not run again",
    )
    parser.add_argument(
        "--again",
        choices=("unexplained", "failed", "skipped", "all"),
        default="",
        help="those of --results that run again",
    )
    parser.add_argument("--markdown", type=Path, help="the page of results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
