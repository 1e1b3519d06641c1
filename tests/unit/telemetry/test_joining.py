"""The heartbeat of `zerotop run` and the script join a run one after the other, on two threads; and what the heartbeat
says of a script that does not."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from runtime.telemetry import Telemetry, publisher
from runtime.telemetry.watching import automatic
from runtime.wire.messages import Hello, RunStatus
from runtime.wire.rundir import RUN_VARIABLE
from runtime.wire.watchlines import WATCH_LINE, WATCH_LINES, watch_line
from tests.harness.fakerun import write_run


@pytest.fixture
def begun(tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process of a run that has not joined it; names of the threads whose heartbeat begins."""
    begun: list[str] = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = write_run(tmp_path, "q1", short_folder, RunStatus(name="q1", state="running"))
    monkeypatch.setenv(RUN_VARIABLE, str(run))
    monkeypatch.setattr(publisher, "_joined", set())
    monkeypatch.setattr(publisher, "_adoptable", {})
    monkeypatch.setattr(automatic, "_join", lambda: begun.append(threading.current_thread().name))
    return begun


def test_the_heartbeat_begins_where_nothing_else_reports(begun: list[str]) -> None:
    automatic.begin()
    assert len(begun) == 1


def test_what_the_script_has_begun_is_left_alone(begun: list[str]) -> None:
    assert isinstance(Telemetry.from_environment(0), Telemetry)
    automatic.begin()
    assert begun == []


def test_the_heartbeat_waits_for_a_script_that_is_joining(begun: list[str]) -> None:
    heartbeat = threading.Thread(target=automatic.begin)
    with publisher.joining:
        heartbeat.start()
        Telemetry.from_environment(0)
    heartbeat.join()
    assert begun == []


JOIN = automatic._join


@pytest.mark.usefixtures("begun")
def test_the_heartbeat_names_the_line_of_the_trainer_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Hello] = []
    monkeypatch.setattr(automatic, "_join", JOIN)
    monkeypatch.setattr(Telemetry, "start", lambda _link, hello: told.append(hello))
    monkeypatch.setattr(automatic, "at_exit", lambda work: work)
    monkeypatch.setitem(sys.modules, "transformers.trainer", sys)
    automatic.begin()
    assert told[0].watch_line.startswith("from zerotop.integrations.transformers import ZerotopCallback")
    assert told[0].watch_line in told[0].impossible["checkpoint"] and "set" in told[0].impossible


def test_the_line_of_a_trainer_is_that_of_the_outermost_one() -> None:
    assert watch_line(["torch", "accelerate"]) == WATCH_LINE
    assert watch_line(["torch", "deepspeed"]).endswith("watch(engine)")
    assert "integrations.transformers" in watch_line(["accelerate", "deepspeed", "transformers.trainer"])
    assert "integrations.lightning" in watch_line(["pytorch_lightning"])


def test_every_line_is_python_that_imports_what_there_is() -> None:
    for line, _ in WATCH_LINES.values():
        imported = compile(line.replace("...", "**{}"), "line", "exec").co_names
        assert imported[0] in (
            "runtime.telemetry",
            "zerotop.integrations.transformers",
            "zerotop.integrations.lightning",
        )
        assert imported[1] in ("watch", "ZerotopCallback")
