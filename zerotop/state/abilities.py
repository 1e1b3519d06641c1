"""What a run can be asked for: everything, if it trains with zerotop's engine; else what its trainer can do."""

from __future__ import annotations

from typing import Literal

from runtime.wire.watchlines import WATCH_LINE
from zerotop.state.run import RunState

NO_RANK = f"no rank of the command has reported to the run: its script has not called watch(): add {WATCH_LINE}"
StopWay = Literal["saves", "stops", "signal"]
"""What a stop does: a checkpoint and then the end; the end alone; SIGTERM to the command."""


def is_wrapped(state: RunState) -> bool:
    """Whether the run is a command of the user's own (`zerotop run`), which zerotop can neither continue nor branch."""
    status, hello = state.status, state.hello
    return (status is not None and status.wrapped) or (hello is not None and bool(hello.trainer))


def why_impossible(state: RunState, command: str) -> str:
    """Why the run's trainer can't obey a command; empty if it can. A stop or an abort is possible without it."""
    if command in ("stop", "abort", "stacks"):
        return ""
    return _why_not_trainer(state, command)


def stop_way(state: RunState) -> StopWay:
    """What a stop does."""
    if _why_not_trainer(state, "stop"):
        return "signal"
    return "stops" if _why_not_trainer(state, "checkpoint") else "saves"


def is_unseen(state: RunState) -> bool:
    """Whether no rank reports its steps, because the script does not call watch(), or has not yet."""
    return is_wrapped(state) and (state.hello is None or not state.hello.counts_steps)


def has_our_checkpoints(state: RunState) -> bool:
    """Whether the run's checkpoints are in zerotop's format, which `zerotop export` reads."""
    return not is_wrapped(state) or (state.hello is not None and not state.hello.trainer)


def _why_not_trainer(state: RunState, command: str) -> str:
    if state.hello is not None:
        return state.hello.impossible.get(command, "")
    return NO_RANK if is_wrapped(state) else ""
