"""Versions of other trainers: those outside of the supported ones are warned of, once, and the docs name the ranges."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from runtime.telemetry import NullTelemetry
from runtime.telemetry.watching import Trainer, Watcher
from runtime.telemetry.watching.introduction import Place
from runtime.telemetry.watching.versions import SUPPORTED, unsupported
from tests.harness import ROOT


def load(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    module = ModuleType(name)
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [
        ("0.19", True),
        ("0.19.8+cpu", True),
        ("0.20.0.dev1", False),
        ("0.18.9", False),
        ("1.0", False),
        ("unknown", True),
        (None, True),
    ],
)
def test_a_version_is_in_its_range_or_not(
    version: str | None, is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, "deepspeed", version)
    found = unsupported(["deepspeed"])
    assert (not found) == is_supported
    assert all(f"deepspeed {version} is not supported (>=0.19, <0.20 is)" in text for text in found)


def test_what_is_not_loaded_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    assert unsupported(["trl"]) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run_is_warned_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, "trl", "3.1")
    events: list[tuple[str, Any]] = []
    link = NullTelemetry()
    link.event = lambda what, text, **named: events.append((what, named["severity"]))  # type: ignore[method-assign]
    watcher = Watcher(link, Place(rank=rank, world_size=2), Trainer("t"))
    for _ in range(2):
        watcher.warn_of_versions(("torch", "trl"))
    assert events == ([("unsupported version", "warning")] if rank == 0 else [])


def test_the_docs_name_the_ranges() -> None:
    text = (ROOT / "docs" / "watch.md").read_text().lower()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name, versions in SUPPORTED.items():
        assert any(name in row and f"| {versions} |" in row for row in rows), name
