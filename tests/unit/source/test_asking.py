"""Waiting for an answer on the command line, where it does not end well."""

from __future__ import annotations

import pytest

from runtime.wire.messages import Ack, Command, CommandRecord
from zerotop.source.command_answers import ask, asker, new_command, refused
from zerotop.state.run import RunState


class Interrupted:
    """A source whose run accepts, and whose user presses Ctrl-C while waiting."""

    connection = "live"
    can_control = True

    def __init__(self) -> None:
        self.state = RunState()

    def start(self) -> None:
        raise AssertionError("ask takes a started source")

    def poll(self) -> bool:
        return False

    def wait(self, timeout_s: float) -> None:
        raise KeyboardInterrupt

    def send(self, command: Command) -> None:
        self.state.apply(CommandRecord(command=command, ack=Ack(id=command.id, number=5, state="accepted")))

    def age_s(self) -> float | None:
        return 0.0

    def close(self) -> None:
        raise AssertionError("the opener closes")


def test_ctrl_c_says_what_is_still_pending(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(Interrupted(), new_command("pause"), until="applied", timeout_s=None)
    assert "#5 pause was accepted and is still pending" in capsys.readouterr().err


def test_commands_have_ids_of_their_own_and_name_the_asker() -> None:
    first, second = new_command("pause"), new_command("pause")
    assert first.id != second.id
    assert first.who == asker()
    ack = refused(first, "no").ack
    assert (ack.id, ack.state, ack.reason) == (first.id, "rejected", "no")
