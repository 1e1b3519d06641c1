"""pause, resume, checkpoint, set, stop, abort: what they send, what they print, how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import Ack, Command, RunStatus
from runtime.wire.rundir import write_json
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run
from zerotop.cli import main
from zerotop.source import command_answers as asking

ACCEPTED_ONLY = 0.3  # seconds that a command waits in vain in these tests


def accepts_only(command: Command) -> list[Ack]:
    return [Ack(id=command.id, number=3, state="accepted")]


def rejects(command: Command) -> list[Ack]:
    return [Ack(id=command.id, number=4, state="rejected", reason="the run is paused already")]


@pytest.mark.parametrize("name", ["pause", "resume", "checkpoint", "stop", "abort"])
def test_applied(name: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    wait = {"checkpoint": ["--wait"], "abort": ["--yes"]}.get(name, [])
    assert main([name, "q1", *wait, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["command"], answer["state"], answer["step"], answer["number"]) == (name, "applied", 7, 1)
    assert answer["id"] == hub.commands[0].id
    assert hub.commands[0].name == name
    user_and_host, _, pid = hub.commands[0].who.rpartition(":")
    assert "@" in user_and_host and pid.isdecimal()


def test_the_newest_live_run_is_the_default(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pause"]) == 0
    assert capsys.readouterr().out == "q1: pause applied as #1 at step 7\n"


def test_checkpoint_returns_when_accepted(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.answer = accepts_only
    assert main(["checkpoint", "q1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "accepted"


def test_checkpoint_wait_waits(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.answer = accepts_only
    assert main(["checkpoint", "q1", "--wait", "--timeout", str(ACCEPTED_ONLY), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["state"] == "accepted"


def test_accepted_but_not_applied_in_time(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "SAY_SO_AFTER_S", 0.0)
    hub.answer = accepts_only
    assert main(["pause", "q1", "--timeout", str(ACCEPTED_ONLY)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "accepted as #3, waiting for a step boundary..." in captured.err
    assert "not applied yet after 0.3 s" in captured.err


def test_rejected(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.answer = rejects
    assert main(["pause", "q1", "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["state"], answer["reason"]) == ("rejected", "the run is paused already")
    assert "q1 rejected pause: the run is paused already" in captured.err


def test_set_sends_values_of_the_right_type(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", "q1", "log_interval=1", "lr_factor=0.5", "log_level=DEBUG", "--json"]) == 0
    assert hub.commands[0].arguments == {"log_interval": 1, "lr_factor": 0.5, "log_level": "debug"}
    assert json.loads(capsys.readouterr().out)["arguments"]["log_interval"] == 1
    assert main(["set", "telemetry_hz=5"]) == 0
    assert hub.commands[1].arguments == {"telemetry_hz": 5.0}


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("log_interval=0", 0, "log_interval: expected a whole number from 1 to 1000000, got 0"),
        ("log_intervall=1", 1, "Did you mean log_interval?"),
        ("log_level=loud", "loud", "expected one of debug, info, warning, error, got loud"),
        ("lr_factor=nan", "nan", "expected a number from 0 to 100, got nan"),
        ("lr_factor=", "", "got nothing"),
    ],
)
def test_set_out_of_range_is_a_rejected_command(
    setting: str, value: object, reason: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["set", "q1", setting, "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["state"] == "rejected"
    assert list(answer["arguments"].values()) == [value]
    assert reason in answer["reason"]
    assert reason in captured.err
    assert hub.commands == []


@pytest.mark.parametrize("words", [["pause", "old"], ["checkpoint", "old", "--wait"], ["set", "old", "log_interval=1"]])
def test_a_run_that_has_ended(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = RunStatus(name="old", state="finished", reason="all 200 steps are done")
    write_run(home, "old", Path("/nowhere"), ended)
    assert main([*words, "--json"]) == 1
    captured = capsys.readouterr()
    message = f"old has ended (finished: all 200 steps are done): there is nothing to {words[0]}"
    assert json.loads(captured.out) == {"error": message}
    assert captured.err == f"zerotop: {message}\n"


def test_a_hub_that_does_not_answer(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(home, "q1", Path("/tmp/zt-nowhere"), RunStatus(name="q1", state="running"))
    assert main(["pause", "q1", "--timeout", str(ACCEPTED_ONLY)]) == 1
    assert "the hub of q1 did not answer within 0.3 s" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "exit_code"), [("stopped", 0), ("failed", 1)])
def test_a_run_that_ends_while_stop_waits(
    state: str, exit_code: int, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    def accept_and_end(command: Command) -> Iterator[Ack]:
        yield from accepts_only(command)
        hub.publish(RunStatus.model_validate({"name": "q1", "state": state, "step": 9}), source="supervisor")

    hub.answer = accept_and_end
    assert main(["stop", "q1", "--json"]) == exit_code
    answer = json.loads(capsys.readouterr().out)
    assert answer["state"] == ("applied" if exit_code == 0 else "rejected")
    assert answer["reason"] == ("" if exit_code == 0 else "the run ended first (failed)")


def test_a_run_whose_supervisor_dies_while_a_command_waits(
    hub: FakeHub, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def accept_and_die(command: Command) -> list[Ack]:
        write_json(home / "zerotop" / "runs" / "q1" / "state.json", RunStatus(name="q1", state="failed"))
        return accepts_only(command)

    hub.answer = accept_and_die
    assert main(["pause", "q1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["reason"] == "the run ended first (failed)"


@pytest.mark.parametrize(("typed", "sent"), [("y\n", 1), ("n\n", 0), ("\n", 0)])
def test_abort_asks_on_a_terminal(typed: str, sent: int, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return typed

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["abort", "q1"]) == (0 if sent else 1)
    assert len(hub.commands) == sent
    assert main(["abort", "q1", "--yes"]) == 0
    assert len(hub.commands) == sent + 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["abort"], "zerotop abort RUN --yes"),
        (["abort", "q1"], "there is no terminal to ask on"),
        (["abort", "--yes"], "zerotop abort RUN --yes"),
        (["abort", "me@box", "--yes"], "name the run, zerotop abort me@box:RUN"),
    ],
    ids=str,
)
def test_abort_without_a_terminal_wants_a_name_and_yes(
    words: list[str], expected: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert expected in capsys.readouterr().err and hub.commands == []


def test_stacks_are_printed_with_their_place(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"path": "logs/1/stacks-1.txt", "text": "q1, attempt 1\nrank 0: pid 7\n"}
    hub.answer = lambda command: [Ack(id=command.id, number=1, state="applied", step=7, result=result)]
    assert main(["stacks", "q1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == result["text"]
    assert captured.err == "saved in the run directory: logs/1/stacks-1.txt\n"
    assert main(["stacks", "q1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == result


def test_a_snapshot_is_sent_with_its_steps_and_says_where_it_is(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"path": "/runs/q1/memory/step-9"}
    hub.answer = lambda command: [Ack(id=command.id, number=1, state="applied", step=9, result=result)]
    assert main(["snapshot", "q1", "--steps", "3"]) == 0
    assert [(command.name, command.arguments) for command in hub.commands] == [("memory-snapshot", {"steps": 3})]
    assert "memory-snapshot applied as #1 at step 9, path /runs/q1/memory/step-9" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refusal:
        main(["snapshot", "q1", "--steps", "0"])
    assert refusal.value.code == 2
    assert "expected a number from 1 to 1000, got '0'" in capsys.readouterr().err


def test_stop_and_abort_say_what_they_do(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["stop", "q1"])
    assert "writes a checkpoint and ends" in capsys.readouterr().err
    main(["abort", "q1", "--yes"])
    assert "without a checkpoint" in capsys.readouterr().err
