"""Commands and their state in one line each: those sent by this screen, and those of others in the run's records."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.wire.messages import Command, CommandName, CommandRecord
from zerotop.format import ms_text
from zerotop.source.command_answers import asker
from zerotop.state.run import RunState, waits_for

SENT_KEPT = 100
ANSWER_BRIGHT_S = 7.0
ANSWER_SHOWN_S = 10.0
"""A final answer is shown in full colour, then dimmed, then removed."""


@dataclass(frozen=True)
class CommandLife:
    """One command. `state` is sent | accepted | applied | rejected. `waited_s` is the time since it was sent, None
    for somebody else's. `answered_s` is the time since its final answer on the hub's clock: None while it is open,
    infinite if that was before this screen opened."""

    id: str
    label: str
    state: str
    text: str
    waited_s: float | None
    answered_s: float | None = None

    @property
    def open(self) -> bool:
        """Whether it has no final answer yet."""
        return self.state in {"sent", "accepted"}

    @property
    def fresh(self) -> bool:
        """Whether it is still shown: open, or answered not long ago."""
        return self.answered_s is None or self.answered_s < ANSWER_SHOWN_S

    @property
    def fading(self) -> bool:
        """Whether it is shown dimmed."""
        return self.answered_s is not None and self.answered_s >= ANSWER_BRIGHT_S


@dataclass
class _Sent:
    command: Command
    at_s: float
    done_s: float | None = None
    done_ns: int = 0


class CommandDesk:
    """Makes commands, and reports what became of them.

    Times are measured on this screen's own clock, from the key to the answer: the hub may be on another machine.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._sent: dict[str, _Sent] = {}
        self._who = asker()

    def make(self, name: CommandName, arguments: dict[str, Any] | None = None) -> Command:
        """A new command; the caller sends it."""
        command = Command(id=uuid.uuid4().hex, name=name, arguments=arguments or {}, who=self._who, wall_s=time.time())
        self._sent[command.id] = _Sent(command, self._now())
        while len(self._sent) > SENT_KEPT:
            del self._sent[next(iter(self._sent))]
        return command

    def waiting(self, state: RunState) -> list[Command]:
        """Commands without a final answer: those that the hub lists, and those of ours that it does not list yet."""
        unseen = [sent.command for key, sent in self._sent.items() if key not in state.commands]
        return state.open_commands() + unseen

    def lives(self, state: RunState, age_s: float = 0.0) -> tuple[CommandLife, ...]:
        """All known commands, oldest first. `age_s` is the time since the hub was heard, by which its clock has
        moved on."""
        now_ns = state.hub_now_ns + int(age_s * 1e9)
        known = [self._life(record, state, now_ns) for record in state.commands.values()]
        for key, sent in self._sent.items():
            if key not in state.commands:
                label, waited = _label(sent.command, 0), self._now() - sent.at_s
                known.append(CommandLife(key, label, "sent", f"{label}: sent … no answer yet", waited))
        return tuple(known)

    def _life(self, record: CommandRecord, state: RunState, now_ns: int) -> CommandLife:
        command, ack = record.command, record.ack
        sent = self._sent.get(command.id)
        if sent is not None and ack.state != "accepted" and sent.done_s is None:
            sent.done_s, sent.done_ns = self._now(), now_ns
        waited_s = None if sent is None else (sent.done_s or self._now()) - sent.at_s
        label = _label(command, ack.number or command.number)
        took = f" ({ms_text(1000 * waited_s)})" if waited_s is not None else ""
        if ack.state == "accepted":
            text = f"{label}: accepted … {waits_for(record)}"
        elif ack.state == "applied":
            step = f" at step {ack.step}" if ack.step is not None else ""
            path = ack.result.get("path")
            result = ", " + "/".join(Path(path).parts[-2:]) if isinstance(path, str) and path else ""
            text = f"{label}: applied{step}{took}{result}"
        else:
            text = f"{label}: rejected: {ack.reason or 'no reason given'}"
        answered_s = None
        if ack.state != "accepted":
            # The answer to a command of ours that a reconnect brought has no arrival: then it counts from our sight
            # of it.
            answered_ns = state.answered_ns.get(command.id) or (sent.done_ns if sent is not None else 0)
            answered_s = max(0, now_ns - answered_ns) / 1e9 if answered_ns else math.inf
        return CommandLife(command.id, label, ack.state, text, waited_s, answered_s)


def _label(command: Command, number: int) -> str:
    arguments = " ".join(f"{key}={value}" for key, value in command.arguments.items())
    name = f"{command.name} {arguments}".strip()
    return f"{name} #{number}" if number else name
