"""See the package: runs each file in a pytest of its own, and counts."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.deepspeed_tests.applicable import FILES, cause_of
from benchmarks.deepspeed_tests.reasons import LEFT_OUT, reason_of, unjudged

SHIM = Path(__file__).parent / "shim"
COLLECTING_S = 60
"""That pytest may take beside a test's own time: to import and collect, and to end a test's processes."""


@dataclass
class Outcome:
    """Of one test."""

    file: str
    name: str
    result: str
    """passed, failed or skipped."""
    seconds: float = 0.0
    cause: str = ""
    message: str = ""

    @property
    def reason(self) -> str:
        """Why it need not pass; empty where nobody has said so."""
        return reason_of(self.file, self.name, self.message)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    tests = arguments.checkout / "tests"
    if not (tests / "unit" / "common.py").is_file():
        print(f"{arguments.checkout}: expected a checkout of DeepSpeed, with tests/unit in it", file=sys.stderr)
        return 2
    there = sorted(str(path.relative_to(tests / "unit")) for path in (tests / "unit").rglob("test_*.py"))
    for file in unjudged(file for file in there if file not in FILES):
        print(f"{file}: neither run nor left out with a reason", file=sys.stderr)
    earlier: dict[str, list[Outcome]] = {}
    for path in arguments.earlier:  # of a file that is in several, the last
        earlier |= _by_file([Outcome(**found) for found in json.loads(path.read_text())])
    outcomes: list[Outcome] = []
    for file in FILES:
        if not any(part in file for part in arguments.files):
            outcomes += earlier.get(file, [])
            continue
        if not (tests / "unit" / file).is_file():
            print(f"{file}: not in this checkout", file=sys.stderr)
            continue
        found = _run(tests.resolve(), file, arguments.sample, arguments.only, arguments.limit_s)
        outcomes += found
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
        counts = Counter(outcome.result for outcome in found)
        print(f"{file}: {', '.join(f'{n} {r}' for r, n in sorted(counts.items())) or 'nothing'}", flush=True)
    text = _table(outcomes, sys.argv[1:] if argv is None else argv)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    return 0


def _by_file(outcomes: list[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.file, []).append(outcome)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deepspeed_tests")
    parser.add_argument("checkout", type=Path, help="folder with DeepSpeed's sources")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="at most N tests of each file, spread evenly"
    )
    parser.add_argument("--files", nargs="*", default=[""], metavar="PART", help="files with one of PART in their name")
    parser.add_argument("--only", default="", metavar="PART", help="tests with PART in their name")
    parser.add_argument("--limit-s", type=float, default=60, help="seconds that one test may take")
    parser.add_argument("--json", type=Path, help="every outcome")
    parser.add_argument(
        "--earlier", nargs="*", type=Path, default=[], metavar="JSON", help="outcomes of the files that are not chosen"
    )
    parser.add_argument("--markdown", type=Path, help="the table")
    return parser


def _run(tests: Path, file: str, sample: int, only: str, limit_s: float) -> list[Outcome]:
    """All of one file. A test that hangs ends DeepSpeed's pytest: it goes on behind it."""
    outcomes: list[Outcome] = []
    while True:
        with tempfile.TemporaryDirectory() as folder:
            done, names = _run_some(tests, file, sample, only, len(outcomes), limit_s, Path(folder))
        outcomes += done
        if len(done) >= len(names):
            return outcomes
        hanging = names[len(done)]
        outcomes.append(Outcome(file, hanging, "failed", limit_s, cause_of("Test hanged"), "no answer in time"))


def _run_some(
    tests: Path, file: str, sample: int, only: str, done: int, limit_s: float, folder: Path
) -> tuple[list[Outcome], list[str]]:
    """As far as pytest came behind the first `done` tests, and the names of those that it was to run."""
    report, names = folder / "report", folder / "names"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "zerotop_sampling", "-W", "ignore"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SHIM),
        "ZEROTOP_DEVICE": "cpu",
        "ZEROTOP_ONLY": only,
        "ZEROTOP_SAMPLE": str(sample),
        "ZEROTOP_DONE": str(done),
        "ZEROTOP_NAMES": str(names),
        "ZEROTOP_REPORT": str(report),
        "PYTEST_XDIST_WORKER": f"gw{os.getpid() % 30}",  # chooses the ports: others may run these tests here, too
        "LOCAL_SIZE": "4",  # DeepSpeed's tests take it for the number of devices
        "OMP_NUM_THREADS": "1",
        "DS_UNITTEST_TIMEOUT": str(int(limit_s)),
    }
    process = subprocess.Popen(
        [*command, f"unit/{file}"],
        cwd=tests,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait(process, report, limit_s + COLLECTING_S)
    finally:
        _end(process)
    found = [_outcome(lines, file) for lines in _by_test(report)]
    listed = names.read_text().split("\n") if names.is_file() else []
    return found, [name for name in listed if name]


def _wait(process: subprocess.Popen[bytes], report: Path, limit_s: float) -> None:
    """Until pytest ends, or says nothing for so long: its own limit does not reach every way to hang."""
    size, since = 0, time.monotonic()
    while process.poll() is None and time.monotonic() - since < limit_s:
        now = report.stat().st_size if report.is_file() else 0
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.2)


def _by_test(report: Path) -> list[list[dict[str, Any]]]:
    """The lines of each test that came to its end."""
    tests: dict[str, list[dict[str, Any]]] = {}
    for line in report.read_text().splitlines() if report.is_file() else []:
        found = json.loads(line)
        tests.setdefault(found["name"], []).append(found)
    return [lines for lines in tests.values() if lines[-1]["when"] == "teardown"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """And the ranks that a hung test leaves behind: they are in its session."""
    import signal

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody is left
    process.wait()


def _outcome(lines: list[dict[str, Any]], file: str) -> Outcome:
    name, seconds = lines[0]["name"], sum(line["seconds"] for line in lines)
    for result in ("failed", "skipped"):
        if (found := next((line for line in lines if line["result"] == result), None)) is not None:
            cause = cause_of(found["message"]) if result == "failed" else ""
            return Outcome(file, name, result, seconds, cause, found["message"])
    return Outcome(file, name, "passed", seconds)


def _table(outcomes: list[Outcome], argv: Sequence[str]) -> str:
    shown = ["CHECKOUT" if Path(word).is_dir() else word for word in argv]
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    explained = [outcome for outcome in outcomes if outcome.result == "failed" and outcome.reason]
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        kind = "explained" if outcome.result == "failed" and outcome.reason else outcome.result
        counts.setdefault(outcome.file, Counter())[kind] += 1
    counts["**all**"] = sum(counts.values(), Counter())
    lines = [
        "# DeepSpeed's own tests, with `runtime` in the place of `deepspeed`",
        f"`python -m benchmarks.deepspeed_tests {' '.join(shown)}`",
        "",
        f"Python {platform.python_version()}, {platform.machine()}, CPUs and Gloo, {minutes:.0f} min. What "
        "DeepSpeed's tests skip on CPUs by themselves counts as skipped.",
        "",
        "| file | passed | failed, with a reason below | failed otherwise | skipped |",
        "|---|---|---|---|---|",
    ]
    for name, found in counts.items():
        lines.append(f"| {name} | {found['passed']} | {found['explained']} | {found['failed']} | {found['skipped']} |")
    lines += ["", "## Why not", "| reason | number | tests |", "|---|---|---|"]
    for reason, number in Counter(outcome.reason for outcome in explained).most_common():
        lines.append(f"| {reason} | {number} | {_named([o for o in explained if o.reason == reason])} |")
    if unexplained := [outcome for outcome in outcomes if outcome.result == "failed" and not outcome.reason]:
        lines += ["", "## Without a reason", "| what it looks like | number | tests |", "|---|---|---|"]
        for cause, number in Counter(outcome.cause for outcome in unexplained).most_common():
            lines.append(f"| {cause} | {number} | {_named([o for o in unexplained if o.cause == cause])} |")
    lines += ["", "## Files that are not run", "| below tests/unit | why |", "|---|---|"]
    lines += [f"| {', '.join(files)} | {why} |" for why, files in LEFT_OUT.items()]
    return "\n".join(lines) + "\n"


def _named(outcomes: list[Outcome]) -> str:
    """File by file, without the parameters."""
    names: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.file, {})[outcome.name.partition("[")[0]] = None
    return "; ".join(f"{file}: {', '.join(found)}" for file, found in names.items())


if __name__ == "__main__":
    sys.exit(main())
