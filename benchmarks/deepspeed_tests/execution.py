"""Runs the tests of one of DeepSpeed's files in a pytest of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.deepspeed_tests.outcomes import Outcome

SHIM = Path(__file__).parent / "shim"
COLLECTING_S = 60
"""That pytest may take beside a test's own time: to import and collect, and to end a test's processes."""


@dataclass(frozen=True)
class Choice:
    """Which tests of a file run."""

    sample: int = 0
    """At most so many of a file, spread evenly; 0: all."""
    cases: int = 0
    """At most so many of each test function, which pytest runs once per set of parameters; 0: all."""
    only: str = ""
    """Those with this in their name."""

    def of(self, names: list[str]) -> list[str]:
        """The chosen ones."""
        found = [name for name in names if self.only in name]
        if self.cases:
            functions: dict[str, list[str]] = {}
            for name in found:
                functions.setdefault(name.partition("[")[0], []).append(name)
            found = [name for cases in functions.values() for name in _spread(cases, self.cases)]
        return _spread(found, self.sample) if self.sample else found


def _spread(names: list[str], number: int) -> list[str]:
    """At most so many of them, at even distances."""
    number = min(number, len(names))
    return [names[at * len(names) // number] for at in range(number)]


def collect(tests: Path, files: list[str]) -> dict[str, list[str]]:
    """The names of the tests in each of `files`. `tests`: the checkout's folder of that name. Raises RuntimeError if
    pytest could not collect them."""
    with tempfile.TemporaryDirectory() as folder:
        attempt = _Attempt(tests, files, None, COLLECTING_S * len(files), Path(folder))
        for _ in attempt.outcomes():
            raise AssertionError("a test ran while they were collected")
        return attempt.names()


def run_file(tests: Path, file: str, wanted: list[str], limit_s: float) -> Iterator[Outcome]:
    """Run the tests of these names; their outcomes as they end. A test that hangs ends DeepSpeed's pytest, and another
    one begins behind it."""
    left = list(wanted)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            attempt = _Attempt(tests, [file], left, limit_s, Path(folder))
            for outcome in attempt.outcomes():
                left.remove(outcome.name)
                yield outcome
            attempt.names()
        if left:
            yield Outcome(file, left.pop(0), "failed", limit_s, "Test hanged, or ended its pytest")


class _Attempt:
    """One pytest, from its start to its end or to the first test that hangs."""

    def __init__(self, tests: Path, files: list[str], wanted: list[str] | None, limit_s: float, folder: Path) -> None:
        """wanted: the names of the tests to run, in their order; None only collects."""
        self._files, self._limit_s = files, limit_s
        self._report, self._names, chosen = folder / "report", folder / "names", folder / "wanted"
        self._said = folder / "output"
        chosen.write_text("\n".join(wanted or []))
        self._read = 0
        """Bytes of the report."""
        self._open: dict[str, list[dict[str, Any]]] = {}
        """The report's lines of tests that have not ended."""
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "zerotop_chosen",
            "-W",
            "ignore",
            *(["--collect-only"] if wanted is None else []),
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *(f"unit/{file}" for file in files)],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": str(SHIM),
                "ZEROTOP_DEVICE": "cpu",
                "ZEROTOP_WANTED": str(chosen),
                "ZEROTOP_NAMES": str(self._names),
                "ZEROTOP_MODULE": f"unit.{files[0].removesuffix('.py').replace('/', '.')}",
                "ZEROTOP_REPORT": str(self._report),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "PYTEST_XDIST_WORKER": f"gw{os.getpid() % 30}",  # chooses the ports: others may run these tests, too
                "LOCAL_SIZE": "4",  # DeepSpeed's tests take it for the number of devices
                "OMP_NUM_THREADS": "1",
                "DS_UNITTEST_TIMEOUT": str(int(limit_s)),
            },
            stdout=self._said.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def outcomes(self) -> Iterator[Outcome]:
        """Until pytest ends, or says nothing for too long: its own limit does not reach every way to hang."""
        since = time.monotonic()
        try:
            while self._process.poll() is None and time.monotonic() - since < self._limit_s + COLLECTING_S:
                before = self._read
                yield from self._ended()
                if self._read != before:
                    since = time.monotonic()
                time.sleep(0.2)
            yield from self._ended()
        finally:
            self._end()

    def names(self) -> dict[str, list[str]]:
        """Of all tests in each file. Raises RuntimeError if pytest could not collect them."""
        if not self._names.is_file():
            said = self._said.read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{', '.join(self._files)} could not be collected: {said}")
        found: dict[str, list[str]] = {file: [] for file in self._files}
        for node in self._names.read_text().split("\n"):
            file, _, name = node.removeprefix("unit/").partition("::")
            if name:
                found[file].append(name)
        return found

    def _ended(self) -> Iterator[Outcome]:
        if not self._report.is_file():
            return
        with self._report.open("rb") as file:
            file.seek(self._read)
            fresh = file.read()
        fresh = fresh[: fresh.rfind(b"\n") + 1]
        self._read += len(fresh)
        for found in map(json.loads, fresh.splitlines()):
            self._open.setdefault(found["name"], []).append(found)
            if found["when"] == "teardown":
                yield _outcome(self._open.pop(found["name"]), self._files[0])

    def _end(self) -> None:
        """And the ranks that a hung test leaves behind: they are in its session."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # nobody is left
        self._process.wait()


def _outcome(lines: list[dict[str, Any]], file: str) -> Outcome:
    name, seconds = lines[0]["name"], round(sum(line["seconds"] for line in lines), 2)
    for result in ("failed", "skipped"):
        if (found := next((line for line in lines if line["result"] == result), None)) is not None:
            return Outcome(file, name, result, seconds, found["message"])
    return Outcome(file, name, "passed", seconds)
