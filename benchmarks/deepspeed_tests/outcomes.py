"""What came of each test, and the file that keeps it: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.deepspeed_tests.reasons import reason_of


@dataclass
class Outcome:
    """Of one test."""

    file: str
    name: str
    result: str
    """passed, failed or skipped."""
    seconds: float = 0.0
    message: str = ""

    @property
    def reason(self) -> str:
        """Why it need not pass; empty where it passes, and where nobody has said so."""
        return reason_of(self.file, self.name, self.message) if self.result == "failed" else ""


class Outcomes:
    """The last outcome of each test, in the order of first runs. `path`: one JSON object per line, appended as they
    come; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, str], Outcome] = {}
        self.names: dict[str, list[str]] = {}
        """File -> the names of all its tests, where they are known."""
        for found in map(json.loads, path.read_text().splitlines() if path is not None and path.is_file() else []):
            if "names" in found:
                self.names[found["file"]] = found["names"]
            else:
                self._remember(Outcome(**found))

    def add(self, outcome: Outcome) -> None:
        self._remember(outcome)
        self._append(asdict(outcome))

    def add_names(self, file: str, names: list[str]) -> None:
        self.names[file] = names
        self._append({"file": file, "names": names})

    def _append(self, found: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(found) + "\n")

    def of(self, file: str) -> list[Outcome]:
        return [outcome for outcome in self._found.values() if outcome.file == file]

    def in_order(self, files: Iterable[str]) -> list[Outcome]:
        return [outcome for file in files for outcome in self.of(file)]

    def _remember(self, outcome: Outcome) -> None:
        self._found[outcome.file, outcome.name] = outcome
