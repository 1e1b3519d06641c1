"""Fixtures of the numerics: outcomes of ranks that many tests compare with, and exports without a process of their
own."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from runtime.export import __main__ as export
from tests.harness.ranks import Ranks
from zerotop.launch import child as child_processes


@pytest.fixture(scope="session")
def _outcomes() -> dict[str, list[Any]]:
    return {}


@pytest.fixture
def reference(ranks: Callable[[int], Ranks], _outcomes: dict[str, list[Any]]) -> Callable[..., list[Any]]:
    """`reference(world, function, *arguments)`: ranks(world).run(...), run once for all tests that ask for the same.

    They share what it gives and only read it. `function` depends on its arguments alone."""

    def outcome(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        key = f"{world} {function.__module__}.{function.__qualname__} {arguments!r}"
        if key not in _outcomes:
            _outcomes[key] = ranks(world).run(function, *arguments)
        return _outcomes[key]

    return outcome


class _ExportHere:
    """As much of a process as `zerotop export` looks at."""

    returncode = -1

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def communicate(self) -> tuple[bytes, None]:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.returncode = export.main(self.words)
        return output.getvalue().encode(), None


@pytest.fixture
def export_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`zerotop export` does its work in this process, which has torch: its own takes a second to import it. What is
    about that process (its start, its signals, its memory, its errors) must not use this."""

    @contextlib.contextmanager
    def child(words: Sequence[str], environment: dict[str, str]) -> Iterator[_ExportHere]:
        yield _ExportHere(words[words.index("-m") + 2 :])

    monkeypatch.setattr(child_processes, "child_process", child)
    monkeypatch.setattr(export, "_ENDS", ())
    monkeypatch.setattr(export, "die_with_parent", lambda number: None)
    monkeypatch.setattr(export, "_give_memory_back", lambda: None)
