"""What the control keys will do, in words, before they do it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.wire.messages import Command, CommandName
from zerotop.format import duration_text
from zerotop.state import abilities
from zerotop.state.outlook import next_boundary
from zerotop.state.progress import progress, steps_at_risk
from zerotop.state.run import RunState
from zerotop.tui.keys import KEYS
from zerotop.tui.screens.confirm import ConfirmScreen

_COMMANDS = {key.action: key.id for key in KEYS if key.steers}
"""Action of a key that acts on the run -> the command that it sends."""
_INSTEAD: dict[abilities.StopWay, str] = {
    "saves": "S stops the run after a checkpoint instead.",
    "stops": "S lets the step in progress end instead, and saves nothing either.",
    "signal": "S sends the command SIGTERM instead.",
}


def pause_or_resume(state: RunState, waiting: Sequence[Command]) -> tuple[CommandName, str]:
    """(what P means now, why it cannot be sent). A second P while the first is still waiting must not reverse it."""
    for command in waiting:
        if command.name in {"pause", "resume"}:
            return "pause", f"{command.name} is still waiting for a step boundary"
    return ("resume" if state.state_name == "paused" else "pause"), ""


def run_name(state: RunState) -> str:
    """The name of the run, as far as it is known."""
    return state.status.name if state.status else state.hello.run if state.hello else "the run"


def why_impossible(state: RunState, action: str) -> str:
    """Why the run's trainer can't do what the key of a steering action asks for; empty if it can."""
    return abilities.why_impossible(state, _COMMANDS[action]) if action in _COMMANDS else ""


def impossible_actions(state: RunState) -> dict[str, str]:
    """Action -> why it is impossible, of those keys that act on the run."""
    return {action: why for action in _COMMANDS if (why := why_impossible(state, action))}


def long_labels(state: RunState) -> dict[str, str]:
    """Action -> what its key does and at which step, for a wide footer."""
    paused = state.state_name == "paused"
    when = "now" if paused else f"after step {next_boundary(state):,}"
    by_signal = abilities.stop_way(state) == "signal"
    return {
        "pause_resume": "Resume" if paused else f"Pause {when}",
        "checkpoint": f"Checkpoint {when}",
        "set": f"Set {when}",
        "stop": "Stop by SIGTERM" if by_signal else f"Stop {when}",
        "abort": "Abort at once",
    }


def stop_question(state: RunState) -> ConfirmScreen:
    """How the run will end, what of it is saved, and how to continue it."""
    name = run_name(state)
    where = "where it is paused" if state.state_name == "paused" else "at the next step boundary"
    way = abilities.stop_way(state)
    if way == "signal":
        why = (
            "its script has not called watch()" if abilities.is_unseen(state) else "its trainer can't be asked to stop"
        )
        lines = (
            f"The command is sent SIGTERM now: {why}.",
            "What it has not saved by itself is lost.",
        )
        return ConfirmScreen(f"stop {name}?", lines, "send SIGTERM", dangerous=True)
    if way == "stops":
        lines = (
            f"Its trainer is asked to end {where}. zerotop can't make it save:",
            "what the script does not save by itself is lost.",
        )
        return ConfirmScreen(f"stop {name}?", lines, "stop", dangerous=True)
    if abilities.is_wrapped(state):
        lines = (
            f"It writes a checkpoint {where}, then its trainer ends. Nothing is lost.",
            "To continue it later, start the command again: its script loads the checkpoint.",
        )
    else:
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
    elif abilities.is_wrapped(state):
        loss = "Lost: what the command has not saved by itself."
    else:
        loss = f"Lost: everything. There is no checkpoint yet ({steps}{time})."
    lines = (
        "The ranks end now: no checkpoint, no waiting for a boundary.",
        loss,
        _INSTEAD[abilities.stop_way(state)],
    )
    return ConfirmScreen(f"abort {name}?", lines, "abort now", dangerous=True)
