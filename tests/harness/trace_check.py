"""A strict reading of trace files in the Trace Event Format: what Perfetto would silently drop is an error here."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from zerotop.trace.writer import open_trace

FLAT = ("steps", "phases", "collectives")
"""Tracks on which no two slices overlap."""
ROUNDING_US = 0.0021
"""Start and duration are each rounded to a nanosecond."""

Slice = tuple[float, float, dict[str, Any]]


class Trace:
    """A checked trace. Raises AssertionError if it is not as it should be."""

    def __init__(self, path: Path) -> None:
        with open_trace(path) as file:
            self.document: dict[str, Any] = json.loads(file.read())
        assert set(self.document) == {"traceEvents", "displayTimeUnit", "metadata"}
        self.metadata: dict[str, Any] = self.document["metadata"]
        self.processes: dict[int, str] = {}
        self.names: dict[tuple[int, int], str] = {}
        self.slices: dict[tuple[int, int], list[Slice]] = defaultdict(list)
        self.marks: list[dict[str, Any]] = []
        open_slices: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for event in self.document["traceEvents"]:
            self._take(event, open_slices)
        assert not any(open_slices.values()), "a slice begins and never ends"
        for key, slices in self.slices.items():
            assert key in self.names, f"track {key} has no name"
            assert key[0] in self.processes, f"process {key[0]} has no name"
            _check_nesting(self.names[key], slices)

    def _take(self, event: dict[str, Any], open_slices: dict[tuple[int, int], list[dict[str, Any]]]) -> None:
        kind, key = event["ph"], (event["pid"], event["tid"])
        assert kind in "XBEMiIsftbenC", event
        assert all(isinstance(part, int) and not isinstance(part, bool) for part in key), event
        assert isinstance(event["name"], str) and event["name"], event
        assert isinstance(event["ts"], int | float) and event["ts"] >= 0, event
        match kind:
            case "M" if event["name"] == "process_name":
                self.processes[key[0]] = event["args"]["name"]
            case "M" if event["name"] == "thread_name":
                self.names[key] = event["args"]["name"]
            case "X":
                assert event["dur"] >= 0, event
                self.slices[key].append((event["ts"], event["ts"] + event["dur"], event))
            case "B":
                open_slices[key].append(event)
            case "E":
                begin = open_slices[key].pop()
                assert event["ts"] >= begin["ts"], event
                self.slices[key].append((begin["ts"], event["ts"], begin))
            case "s" | "f" | "t":
                assert "id" in event, event
            case "i" | "I":
                self.marks.append(event)

    def track(self, process: str, name: str) -> list[Slice]:
        """The slices of the track of that name in the process whose name begins with `process`, by their starts."""
        found = [key for key, own in self.names.items() if own == name and self.processes[key[0]].startswith(process)]
        assert len(found) <= 1, f"{len(found)} tracks are called {name}"
        return sorted(self.slices[found[0]], key=lambda one: one[:2]) if found else []


def _check_nesting(name: str, slices: list[Slice]) -> None:
    """Slices of a track follow each other or are inside each other; on flat tracks they follow each other."""
    stack: list[Slice] = []
    for one in sorted(slices, key=lambda one: (one[0], -one[1])):
        while stack and stack[-1][1] <= one[0] + ROUNDING_US:
            stack.pop()
        assert not stack or name not in FLAT, f"{name}: {stack[-1][2]} and {one[2]} overlap"
        assert not stack or one[1] <= stack[-1][1] + ROUNDING_US, f"{name}: {one[2]} outlasts {stack[-1][2]}"
        stack.append(one)
