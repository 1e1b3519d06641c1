"""zerotop profile: what it sends, what it refuses, and how it waits for the file."""

from __future__ import annotations

import json

import pytest

from runtime.wire.messages import Ack, Command, Event
from runtime.wire.profile import DONE
from tests.harness.fakehub import FakeHub
from zerotop.cli import main


def test_it_is_done_when_it_is_applied(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "q1", "--steps", "5", "--ranks", "1,0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["state"], answer["step"]) == ("applied", 7)
    assert hub.commands[0].arguments == {"steps": 5, "ranks": [0, 1]}
    assert main(["profile", "q1"]) == 0
    assert hub.commands[1].arguments == {"steps": 3, "ranks": [0, 1]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "profile: --steps: expected a whole number from 1 to 100, got 0"),
        (["--steps", "101"], "expected a whole number from 1 to 100, got 101"),
        (["--ranks", "0,2"], "profile: --ranks: 2: the run has ranks 0 to 1"),
        (["--ranks", "all"], "profile: --ranks: expected numbers such as 0,3, got 'all'"),
        (["--ranks", ""], "profile: --ranks: expected numbers such as 0,3, got ''"),
    ],
)
def test_bad_usage(words: list[str], said: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "q1", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert hub.commands == []


def test_no_such_run(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "nope"]) == 2
    assert "there is no run called 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["profiles/profile-1-steps-8-10.json.gz", ""])
def test_wait_returns_with_the_file(path: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(command: Command) -> list[Ack]:
        for identity in ("another", command.id):
            data = {"id": identity, "path": path, "problem": "" if path else "rank 0: no"}
            hub.publish(Event(rank=None, what=DONE, text="x", data=data, wall_s=0), source="supervisor")
        return [Ack(id=command.id, number=1, state="applied", step=7, rank=0)]

    hub.answer = answer
    assert main(["profile", "q1", "--wait", "--json"]) == (0 if path else 1)
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["state"] == ("applied" if path else "rejected")
    assert document["result"].get("path", "") == path
    assert path or "rank 0: no" in captured.err
