"""What the control keys will do, in words, before they do it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.wire.messages import Command, CommandName
from zerotop.format import duration_text
from zerotop.state.progress import progress, steps_at_risk
from zerotop.state.run import RunState
from zerotop.tui.screens.confirm import ConfirmScreen


def pause_or_resume(state: RunState, waiting: Sequence[Command]) -> tuple[CommandName, str]:
    """(what P means now, why it cannot be sent). A second P while the first is still waiting must not reverse it."""
    for command in waiting:
        if command.name in {"pause", "resume"}:
            return "pause", f"{command.name} is still waiting for a step boundary"
    return ("resume" if state.state_name == "paused" else "pause"), ""


def run_name(state: RunState) -> str:
    """The name of the run, as far as it is known."""
    return state.status.name if state.status else state.hello.run if state.hello else "the run"


def stop_question(state: RunState) -> ConfirmScreen:
    """Where the run will stop, that nothing is lost, and how to continue it."""
    name = run_name(state)
    where = "where it is paused" if state.state_name == "paused" else "at the next step boundary"
    lines = (
        f"It writes a checkpoint {where}, then the run ends. Nothing is lost.",
        f"To continue it later: zerotop launch --resume --name {name}",
    )
    return ConfirmScreen(f"stop {name}?", lines, "checkpoint, then stop", dangerous=False)


def abort_question(state: RunState) -> ConfirmScreen:
    """What is lost: the steps since the newest checkpoint, and the time they took."""
    name = run_name(state)
    lost = steps_at_risk(state)
    saved = state.status.last_checkpoint_step if state.status else None
    step_ms = progress(state).step_ms
    time = f", about {duration_text(lost * step_ms / 1000)} of training" if step_ms and lost else ""
    steps = f"{lost} step{'s' if lost != 1 else ''}"
    if saved is not None:
        loss = (
            f"Lost: {steps} since the checkpoint at step {saved}{time}."
            if lost
            else f"Nothing is lost: step {saved} is saved."
        )
    else:
        loss = f"Lost: everything. There is no checkpoint yet ({steps}{time})."
    lines = (
        "The ranks end now: no checkpoint, no waiting for a boundary.",
        loss,
        "S stops the run after a checkpoint instead.",
    )
    return ConfirmScreen(f"abort {name}?", lines, "abort now", dangerous=True)
