"""Errors of a config: all problems at once, each with its key, what was expected, and how to fix it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Path = tuple[str, ...]
"""The keys that lead to a value, e.g. ("zero_optimization", "stage")."""


class ConfigError(Exception):
    """A config that cannot be used. `str(error)` is the full message, `problems` its parts, one per mistake."""

    def __init__(self, problems: Sequence[str] | str, origin: str = "") -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        self.origin = origin
        if len(self.problems) == 1:
            text = f"{origin}: {self.problems[0]}" if origin else self.problems[0]
        else:
            head = f"{origin} has {len(self.problems)} problems:" if origin else f"{len(self.problems)} problems:"
            text = "\n".join([head, *(f"  - {_indent(problem)}" for problem in self.problems)])
        super().__init__(_printable(text))


def _printable(text: str) -> str:
    """`text` with unprintable characters escaped, as keys may contain terminal control sequences."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _indent(problem: str) -> str:
    return problem.replace("\n", "\n    ")


@dataclass(frozen=True)
class Origin:
    """Where a config came from, so that a problem can name the line or the --set that caused it."""

    name: str = "config"
    """The file as the user wrote it, or "config" for a dictionary."""
    is_file: bool = False
    """Whether `name` is a file."""
    lines: Mapping[Path, int] = field(default_factory=dict)
    """Line number in the file, from 1, of every key."""
    overrides: Mapping[Path, str] = field(default_factory=dict)
    """The --set argument that gave a key its value."""

    def place(self, path: Path) -> str:
        """`line 7` or `--set a.b=1` for the key at `path` or its nearest parent; empty when not known."""
        heads = [path[:length] for length in range(len(path), 0, -1)]
        for head in heads:  # first, because an override replaces everything that the file has below its key
            if head in self.overrides:
                return f"--set {self.overrides[head]}"
        for head in heads:
            if head in self.lines:
                return f"line {self.lines[head]}"
        below = [text for key, text in self.overrides.items() if key[: len(path)] == path]
        return f"--set {below[0]}" if below else ""


@dataclass
class Findings:
    """What was found while reading a config: problems, keys without effect, and keys that are "auto"."""

    origin: Origin = field(default_factory=Origin)
    problems: list[str] = field(default_factory=list)
    no_effect: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys without effect for this reason."""
    autos: set[Path] = field(default_factory=set)
    """Keys whose value is "auto" and that are therefore treated as absent."""
    vocabulary: Mapping[str, Path] = field(default_factory=dict)
    """Name of every key -> its path, for suggestions."""

    def problem(self, path: Path, text: str) -> None:
        """Record that the value at `path` is wrong; `text` continues after the key."""
        place = self.origin.place(path)
        self.problems.append(f"{clipped(place, 200) + ': ' if place else ''}{clipped(dotted(path), 200)}{text}")

    def ignored(self, path: Path, reason: str) -> None:
        """Record that the key at `path` has no effect here, because `reason`."""
        self.no_effect.setdefault(reason, []).append(dotted(path))

    def raise_if_any(self) -> None:
        """Raise ConfigError if any problem was recorded."""
        if self.problems:
            raise ConfigError(self.problems, self.origin.name)

    def notes(self) -> list[str]:
        """One line per reason: the keys without effect and the reason."""
        return [f"{', '.join(keys)}: no effect here, because {reason}" for reason, keys in self.no_effect.items()]


def dotted(path: Iterable[str]) -> str:
    """The path as users write it: "zero_optimization.stage"."""
    return ".".join(path)


def clipped(text: str, limit: int = 60) -> str:
    """`text`, or its beginning and "..." when it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: Any, limit: int = 60) -> str:
    """A JSON value as the user wrote it, with its kind in words where that is not obvious: `"16" (a string)`."""
    text = json.dumps(value, default=repr, ensure_ascii=False, skipkeys=True)
    text = clipped(text, limit)
    if isinstance(value, str):
        return f"{text} (a string)"
    if isinstance(value, list | tuple):
        return f"{text} (a list)"
    if isinstance(value, Mapping):
        return f"{text} (an object)"
    return text


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` most like `word`, or None when none is close."""
    by_fold = {candidate.lower(): candidate for candidate in words}
    folded = word.strip().lower().replace("-", "_")
    near = difflib.get_close_matches(folded, by_fold, n=1, cutoff=0.6)
    return by_fold[near[0]] if near else None
