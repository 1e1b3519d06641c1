"""The heartbeat of `zerotop run` and the script join a run one after the other, on two threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from runtime.telemetry import Telemetry, publisher
from runtime.telemetry.watching import automatic
from runtime.wire.messages import RunStatus
from runtime.wire.rundir import RUN_VARIABLE
from tests.harness.fakerun import write_run


@pytest.fixture
def begun(tmp_path: Path, short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process of a run that has not joined it; names of the threads whose heartbeat begins."""
    begun: list[str] = []
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = write_run(tmp_path, "q1", short_folder, RunStatus(name="q1", state="running"))
    monkeypatch.setenv(RUN_VARIABLE, str(run))
    monkeypatch.setattr(publisher, "_joined", set())
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
