"""zerotop stream: JSON lines of a live run, and of one that has ended."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.judgement import Alert
from runtime.wire.messages import Event, Heartbeat, RunStatus, message_kinds
from tests.harness.fakehub import FakeHub, hello, step_result
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient, until
from zerotop.cli import main
from zerotop.hub.recorder import Recorder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def stream(*words: str) -> tuple[threading.Thread, list[int]]:
    """The command in a thread, and its exit code."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["stream", *words])))
    thread.start()
    return thread, codes


def test_a_live_run_begins_with_its_state_and_ends_with_the_run(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    thread, codes = stream("q1")
    until(lambda: hub.snapshots_sent, "the command's question for the state")
    beat = {"rank": 0, "phase": "forward", "phase_since_ns": 0, "step": 1, "micro_step": 1, "micro_steps": 1}
    beat |= {"entered_seq": 0, "completed_seq": 0, "progress_ns": 0, "now_ns": 0}
    hub.publish(step_result(0, 5, loss=math.nan), Heartbeat.model_validate(beat))
    hub.publish(Alert(name="a", rule="loss > 1", state="firing", text="loss 2"), source="supervisor")
    hub.publish(Event(rank=None, what="note", text="one\nline\u2028 \x1b[31m", wall_s=5.0), source="supervisor")
    hub.publish(RunStatus(name="q1", state="finished", attempt=1, step=5), source="supervisor")
    thread.join(patient(20))
    assert codes == [0]
    got = lines(capsys.readouterr().out)
    assert [one["kind"] for one in got] == ["status", "hello", "hello", "step", "alert", "event", "status"]
    assert all({"received_wall_s", "attempt", "source"} <= set(one) for one in got)
    step = got[3]
    assert (step["step"], step["loss"], step["rank"], step["source"]) == (5, None, 0, "rank/0")
    assert got[5]["text"] == "one\nline\u2028 \x1b[31m"
    assert got[-1]["state"] == "finished"


def test_only_some_kinds_and_a_run_that_fails(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    thread, codes = stream("q1", "--kind", "step", "--kind", "alert")
    until(lambda: hub.snapshots_sent, "the command's question for the state")
    hub.publish(step_result(0, 5))
    hub.publish(step_result(1, 5), source="rank/1")
    hub.publish(RunStatus(name="q1", state="failed", attempt=1), source="supervisor")
    thread.join(patient(20))
    assert codes == [1]
    assert [(one["kind"], one["rank"]) for one in lines(capsys.readouterr().out)] == [("step", 0), ("step", 1)]


def test_a_run_that_has_ended_comes_from_its_recording(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(home, "done", home, RunStatus(name="done", state="finished", attempt=1, step=2), supervisor_pid=0)
    recorder = Recorder(run / "recording.sqlite", 1)
    recorder.add("rank/0", hello(0))
    for step in (1, 2):
        recorder.add("rank/0", step_result(0, step))
    recorder.close()
    assert main(["stream", "done"]) == 0
    got = lines(capsys.readouterr().out)
    assert [one["kind"] for one in got] == ["hello", "step", "step", "status"]
    assert got[1]["received_wall_s"] > 0 and got[1]["attempt"] == 1
    assert main(["stream", "done", "--kind", "status"]) == 0
    assert [one["state"] for one in lines(capsys.readouterr().out)] == ["finished"]


def test_an_unknown_kind(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--kind", "stp"]) == 2
    said = capsys.readouterr().err
    assert "--kind stp: there is no such kind of message. Did you mean step? Known: alert, checkpoint_saved," in said


def test_the_documentation_lists_every_kind() -> None:
    from tests.harness import ROOT

    text = (ROOT / "docs" / "alerts.md").read_text()
    assert [kind for kind in message_kinds() if f"`{kind}`" not in text] == []
