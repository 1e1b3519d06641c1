"""When telemetry starts, and what a process outside a run gets."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.telemetry import NullTelemetry, Telemetry, TelemetryError
from runtime.wire.messages import Ack
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, SUPERVISOR_VARIABLE, RunFile, write_json
from tests.harness import ROOT
from tests.harness.fakehub import hello, step_result
from tests.harness.waiting import patient


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fields = {
        "name": "r1",
        "created_wall_s": 0,
        "attempt": 3,
        "host": "box",
        "boot_id": "b",
        "nproc": 1,
        "device": "cpu",
    }
    paths = {"config_path": "c.json", "config_folder": ".", "sockets": "/tmp/zerotop-test/none"}
    write_json(tmp_path / "run.json", RunFile.model_validate(fields | paths))
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    monkeypatch.delenv(ATTEMPT_VARIABLE, raising=False)
    monkeypatch.delenv(SUPERVISOR_VARIABLE, raising=False)
    return tmp_path


def test_the_run_directory_says_where_the_sockets_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry = Telemetry.from_environment(2)
    assert isinstance(telemetry, Telemetry)
    assert (telemetry.rank, telemetry.attempt) == (2, 3)
    assert telemetry._sockets.path("ranks") == Path("/tmp/zerotop-test/none/ranks")
    assert telemetry._supervisor_pid is None
    monkeypatch.setenv(ATTEMPT_VARIABLE, "4")
    monkeypatch.setenv(SUPERVISOR_VARIABLE, "1234")
    telemetry = Telemetry.from_environment(2)
    assert isinstance(telemetry, Telemetry)
    assert (telemetry.attempt, telemetry._supervisor_pid) == (4, 1234)


@pytest.mark.parametrize("variable", [ATTEMPT_VARIABLE, SUPERVISOR_VARIABLE])
def test_a_number_that_is_none_is_refused(run: Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "first")
    with pytest.raises(TelemetryError, match=f"{variable}: expected a whole number, got 'first'"):
        Telemetry.from_environment(0)


@pytest.mark.parametrize("content", [None, "{", '{"name": "r1"}'])
def test_a_folder_that_is_no_run_directory_is_said_in_one_line(run: Path, content: str | None) -> None:
    (run / "run.json").unlink()
    if content is not None:
        (run / "run.json").write_text(content)
    with pytest.raises(TelemetryError, match="is not a run directory") as caught:
        Telemetry.from_environment(0)
    assert "\n" not in str(caught.value) and "unset it to train without telemetry" in str(caught.value)


def test_outside_a_run_every_call_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    telemetry = Telemetry.from_environment(0)
    assert isinstance(telemetry, NullTelemetry)
    threads = threading.active_count()
    telemetry.start(hello())
    telemetry.enter("forward", 1, 1)
    with telemetry.span("reduce"), telemetry.span("gather"):
        telemetry.completed(telemetry.issued("all_reduce", 8), "all_reduce", 8, 0, 1, 0)
    telemetry.step(step_result())
    telemetry.event("note", "nobody hears", severity="warning", step=1, data={})
    telemetry.log("info", "nobody hears")
    telemetry.ack(Ack(id="a", state="applied"))
    telemetry.memory_changed()
    telemetry.hz = 3.0
    assert not telemetry.inbox.waiting() and not telemetry.inbox.orphaned
    start = time.monotonic()
    telemetry.goodbye("finished", 1)
    telemetry.close()
    assert time.monotonic() - start < patient(0.1)
    assert threading.active_count() == threads


def test_both_kinds_of_telemetry_are_called_alike() -> None:
    def calls(kind: type) -> dict[str, list[tuple[str, object, object]]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in methods
            if not name.startswith("_") and name not in ("drain", "position", "introduce", "offer")
        }

    assert calls(Telemetry) == calls(NullTelemetry)


def test_importing_telemetry_loads_neither_torch_nor_a_screen() -> None:
    foreign = ("torch", "numpy", "textual", "zerotop")
    code = f"import sys, runtime.telemetry; print([name for name in {foreign} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
