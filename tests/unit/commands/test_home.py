"""zerotop alone without a terminal, and its demo run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.config import load
from runtime.wire.messages import RunStatus
from tests.harness.fakerun import write_run
from zerotop.cli import main
from zerotop.commands import home as module
from zerotop.launch import start as launching
from zerotop.rundir.directory import read_entry


def test_without_a_terminal_it_prints_the_help(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "zerotop launch config.json" in capsys.readouterr().err


def test_the_demo_is_a_config_that_two_ranks_on_a_cpu_take() -> None:
    resolved = load(module.demo_config()).resolve(2, "cpu", script=False)
    assert resolved.stage == 2 and resolved.zerotop.model.preset == "gpt-tiny"


def test_a_demo_run_gets_a_free_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(home, "demo-1", home, RunStatus(name="demo-1", state="finished"))
    asked: dict[str, Any] = {}

    def start(config: Path, **arguments: Any) -> Any:
        asked.update(arguments, config=config)
        return read_entry(write_run(home, arguments["name"], home, RunStatus(name="demo-2", state="running")))

    monkeypatch.setattr(launching, "start_run", start)
    assert module.start_demo() == "demo-2"
    assert asked["nproc"] == 2 and asked["device"] == "cpu" and asked["config"] == module.demo_config()
    assert "starting the demo run" in capsys.readouterr().err


def test_a_monitor_without_a_trainer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.demo_problem() == ""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert module.demo_problem().startswith("training needs torch, not installed here: pip install")
