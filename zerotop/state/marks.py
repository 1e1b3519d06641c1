"""What happened at which step: checkpoints, restarts, pauses, changed settings. Plots show it on their axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.wire.messages import CheckpointSaved, Event
from zerotop.state.run import RunState

MarkKind = Literal["checkpoint", "restart", "pause", "setting", "trouble"]
TROUBLE = frozenset({"overflow", "not finite"})


@dataclass(frozen=True)
class StepMark:
    """`text` is one line."""

    step: int
    kind: MarkKind
    text: str


def step_marks(state: RunState) -> list[StepMark]:
    """All that are known, by rising step."""
    found: dict[tuple[int, MarkKind], StepMark] = {}

    def mark(step: int | None, kind: MarkKind, text: str) -> None:
        if step is not None:
            found[step, kind] = StepMark(step, kind, text)

    for record in state.events:
        if isinstance(record, CheckpointSaved):
            mark(record.step, "checkpoint", f"checkpoint at step {record.step:,}")
        elif isinstance(record, Event) and record.what in TROUBLE:
            mark(record.step, "trouble", record.text or record.what)
    status, hello = state.status, state.hello
    if status is not None and status.last_checkpoint_step is not None:
        mark(status.last_checkpoint_step, "checkpoint", f"checkpoint at step {status.last_checkpoint_step:,}")
    if status is not None and status.restarts and hello is not None:
        mark(hello.start_step, "restart", f"restart {status.restarts}: {status.restart_reason}")
    for given in state.commands.values():
        if given.ack.state != "applied":
            continue
        who = f" by {given.command.who}" if given.command.who else ""
        if given.command.name == "pause":
            mark(given.ack.step, "pause", f"paused{who}")
        elif given.command.name == "set":
            values = ", ".join(f"{key}={value}" for key, value in given.command.arguments.items())
            mark(given.ack.step, "setting", f"{values}{who}")
    return sorted(found.values(), key=lambda one: (one.step, one.kind))
