"""Send a command to a run's hub and wait for its answer, without a screen."""

from __future__ import annotations

import getpass
import os
import socket
import time
import uuid
from typing import Any, Literal, cast

from runtime.wire.messages import Ack, Command, CommandName, CommandRecord
from zerotop.format import duration_text
from zerotop.output import CommandError, say
from zerotop.source.base import Source
from zerotop.state.run import waits_for

HUB_ANSWERS_WITHIN_S = 10.0
SAY_SO_AFTER_S = 1.0


def asker() -> str:
    """user@host:pid, the sender of a command in the run's records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose uid has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"


def new_command(name: str, arguments: dict[str, Any] | None = None) -> Command:
    """A command with a new id and the sender."""
    return Command(
        id=uuid.uuid4().hex, name=cast(CommandName, name), arguments=arguments or {}, who=asker(), wall_s=time.time()
    )


def refused(command: Command, reason: str) -> CommandRecord:
    """The record of a command that was rejected before it was sent."""
    return CommandRecord(command=command, ack=Ack(id=command.id, state="rejected", reason=reason, wall_s=time.time()))


def ask(
    source: Source, command: Command, *, until: Literal["accepted", "applied"], timeout_s: float | None
) -> CommandRecord:
    """Send `command` and return its record once it is rejected, once it has reached `until`, or as accepted after
    `timeout_s`, with a reason.

    After a second, what it waits for is printed to stderr. Raises CommandError if no hub answers.
    """
    try:
        return _ask(source, command, until, timeout_s)
    except KeyboardInterrupt:
        record = source.state.commands.get(command.id)
        if record is not None and record.ack.state == "accepted":
            say(f"#{record.ack.number} {command.name} was accepted and is still pending")
        raise


def _ask(source: Source, command: Command, until: str, timeout_s: float | None) -> CommandRecord:
    started = time.monotonic()
    source.send(command)
    said = False
    while True:
        source.poll()
        record = source.state.commands.get(command.id)
        waited_s = time.monotonic() - started
        if record is not None:
            if record.ack.state != "accepted" or until == "accepted":
                return record
            if source.connection == "ended":
                return _at_the_end(source, record)
            if timeout_s is not None and waited_s > timeout_s:
                return _with(record, reason=f"not applied yet after {duration_text(timeout_s)}; still pending")
            if not said and waited_s > SAY_SO_AFTER_S:
                said = True
                say(f"accepted as #{record.ack.number}, {waits_for(record)}...")
        else:
            if not source.can_control:
                raise CommandError(source.connection.removeprefix("lost: "))
            limit_s = min(timeout_s or HUB_ANSWERS_WITHIN_S, HUB_ANSWERS_WITHIN_S)
            if waited_s > limit_s:
                name = source.state.status.name if source.state.status else "the run"
                raise CommandError(
                    f"the hub of {name} did not answer within {duration_text(limit_s)} ({source.connection}); "
                    f"the command may or may not have been applied: check with zerotop status {name}",
                    exit_code=1,
                )
        source.wait(0.05)


def _at_the_end(source: Source, record: CommandRecord) -> CommandRecord:
    """The run ended with the command still open: for stop and abort that means applied, for others rejected."""
    status = source.state.status
    assert status is not None
    done = {"stop": ("stopped", "finished"), "abort": ("aborted",)}.get(record.command.name, ())
    if status.state in done:
        return _with(record, state="applied", step=status.step)
    return _with(record, state="rejected", reason=f"the run ended first ({status.state})")


def _with(record: CommandRecord, **changes: Any) -> CommandRecord:
    return record.model_copy(update={"ack": record.ack.model_copy(update=changes)})
