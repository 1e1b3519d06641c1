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
COLLECTION = "(collection)"
"""In the place of a test's name where a file's tests could not be collected."""


@dataclass(frozen=True)
class Choice:
    """Which tests of a file run."""

    sample: int = 0
    """At most so many, spread evenly; 0: all."""
    only: str = ""
    """Those with this in their name."""


def run_file(tests: Path, file: str, choice: Choice, known: set[str], limit_s: float) -> Iterator[Outcome]:
    """All chosen ones whose names are not `known`, as they end. `tests`: the checkout's folder of that name. A test
    that hangs ends DeepSpeed's pytest, and another one begins behind it."""
    known = set(known)
    while True:
        with tempfile.TemporaryDirectory() as folder:
            attempt = _Attempt(tests, file, choice, known, limit_s, Path(folder))
            for outcome in attempt.outcomes():
                known.add(outcome.name)
                yield outcome
            left = [name for name in attempt.names() if name not in known]
            if (problem := attempt.problem()) is not None:
                yield Outcome(file, COLLECTION, "failed", 0.0, problem)
                return
        if not left:
            return
        known.add(left[0])
        yield Outcome(file, left[0], "failed", limit_s, "Test hanged, or ended its pytest")


class _Attempt:
    """One pytest, from its start to its end or to the first test that hangs."""

    def __init__(self, tests: Path, file: str, choice: Choice, known: set[str], limit_s: float, folder: Path) -> None:
        self._file, self._limit_s = file, limit_s
        self._report, self._names, done = folder / "report", folder / "names", folder / "done"
        self._said = folder / "output"
        done.write_text("\n".join(known))
        self._read = 0
        """Bytes of the report."""
        self._open: dict[str, list[dict[str, Any]]] = {}
        """The report's lines of tests that have not ended."""
        options = ["-q", "-p", "no:cacheprovider", "-p", "zerotop_sampling", "-W", "ignore"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, f"unit/{file}"],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": str(SHIM),
                "ZEROTOP_DEVICE": "cpu",
                "ZEROTOP_ONLY": choice.only,
                "ZEROTOP_SAMPLE": str(choice.sample),
                "ZEROTOP_DONE": str(done),
                "ZEROTOP_NAMES": str(self._names),
                "ZEROTOP_MODULE": f"unit.{file.removesuffix('.py').replace('/', '.')}",
                "ZEROTOP_REPORT": str(self._report),
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

    def names(self) -> list[str]:
        """Of the tests that it was to run."""
        listed = self._names.read_text().split("\n") if self._names.is_file() else []
        return [name for name in listed if name]

    def problem(self) -> str | None:
        """Why there are no names: the end of what pytest said; None if there are."""
        return None if self._names.is_file() else self._said.read_text(errors="replace")[-1500:]

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
                yield _outcome(self._open.pop(found["name"]), self._file)

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
