"""What zerotop.notify can be told of: the built-in conditions, and the alerts, found by looking at the state.

Only the state is compared with the look before, so that nothing is missed when messages are: a screen's connection may
drop them, and then gets the whole state again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from runtime.wire.messages import LIVE_STATES, Event, StepResult
from zerotop.alerts.metrics import newest_step
from zerotop.format import figure_text
from zerotop.output import with_exit_code
from zerotop.state.abilities import is_wrapped
from zerotop.state.condition import condition_of
from zerotop.state.run import RunState

ENDS = frozenset({"failed", "finished", "stopped", "aborted"})
_HANG = "hang: "
"""How the status's reason begins while a hang lasts (zerotop/diagnose/hang.py)."""


@dataclass(frozen=True)
class Notice:
    """One thing to tell. `what` is a built-in condition, "verdict" and what that says, or the name of an alert; `over`:
    it has ended. One of an alert has `is_alert`, one of a verdict `is_verdict`."""

    what: str
    text: str
    severity: Literal["info", "warning", "error"] = "info"
    ranks: tuple[int, ...] = ()
    step: int = 0
    over: bool = False
    is_alert: bool = False
    is_verdict: bool = False
    since_wall_s: float = 0.0
    """Another value: it has begun again."""

    @property
    def ends_run(self) -> bool:
        """Whether it is how the run ended."""
        return self.what in ENDS and not self.is_alert


class Conditions:
    """Call `look` several times a second with the state of a run; it returns what is new."""

    def __init__(self) -> None:
        self._active: dict[str, Notice] = {}
        self._restarts: int | None = None
        self._ended = False
        self._bad_step_wall_s = 0.0

    def look(self, state: RunState, connection: str = "live") -> list[Notice]:
        """The notices since the last look. `connection` is that of the source."""
        news = self._restarted(state)
        live = state.state_name in LIVE_STATES
        active = self._holding(state, connection) if live else self._active
        for what, notice in active.items():
            before = self._active.get(what)
            if before is None or notice.since_wall_s != before.since_wall_s:
                news.append(notice)
        for what, notice in self._active.items():
            if what not in active and what != "nan":
                news.append(_over(notice, state))
        self._active = active
        if not live and state.status is not None and not self._ended:
            self._ended = True
            news.append(_end(state))
        return news

    def lost(self, state: RunState) -> list[Notice]:
        """The supervisor is gone without a word: so are the ranks."""
        if self._ended:
            return []
        self._ended = True
        text = f"the supervisor was killed at step {state.step}"
        if not is_wrapped(state):
            text += "; launch --resume continues from the newest checkpoint"
        return [Notice("failed", text, "error", step=state.step)]

    def _restarted(self, state: RunState) -> list[Notice]:
        status = state.status
        if status is None:
            return []
        before, self._restarts = self._restarts, status.restarts
        if before is None or status.restarts <= before:
            return []
        return [Notice("restarted", status.restart_reason or status.reason, "warning", _failed(state), state.step)]

    def _holding(self, state: RunState, connection: str) -> dict[str, Notice]:
        found: dict[str, Notice] = {}
        reason = state.status.reason if state.status is not None else ""
        verdict = state.verdict
        condition = condition_of(state, connection)
        if condition.name == "stalled":
            ranks = tuple(verdict.ranks) if verdict is not None and verdict.severity == "error" else ()
            found["stalled"] = Notice("stalled", condition.text, "warning", ranks, state.step)
        if reason.startswith(_HANG):
            text = reason.removeprefix(_HANG).partition("; stacks: ")[0]
            found["hang"] = Notice("hang", text, "error", tuple(verdict.ranks) if verdict else (), state.step)
        if verdict is not None and verdict.severity != "info" and verdict.what != "failed":
            # Each kind under a name of its own: a hang must not be held back because a straggler was told.
            notice = Notice(
                f"verdict {verdict.what}",
                verdict.text,
                verdict.severity,
                tuple(verdict.ranks),
                state.step,
                is_verdict=True,
                since_wall_s=verdict.since_wall_s,
            )
            found[notice.what] = notice
        if (bad := self._not_finite(state)) is not None:
            found["nan"] = bad
        for alert in state.alerts.values():
            if alert.state == "firing":
                found[alert.name] = Notice(
                    alert.name,
                    alert.text,
                    alert.severity,
                    tuple(alert.ranks),
                    alert.step or 0,
                    is_alert=True,
                    since_wall_s=alert.since_wall_s,
                )
        return found

    def _not_finite(self, state: RunState) -> Notice | None:
        """The newest step, or the first event about one since the last look: further steps may have come meanwhile."""
        told = [event for event in state.events if isinstance(event, Event) and event.what == "not finite"]
        new = [event for event in told if event.wall_s > self._bad_step_wall_s]
        if new:
            self._bad_step_wall_s = new[-1].wall_s
            first = min(new, key=lambda event: event.step or 0)  # NaN spreads to the other ranks in a step
            ranks = () if first.rank is None else (first.rank,)
            return Notice("nan", first.text, "error", ranks, first.step or state.step)
        step = newest_step(state)
        if step is not None and _is_bad(step):
            text = f"step {step.step}: loss {figure_text(step.loss)}, gradient norm {figure_text(step.grad_norm)}"
            return Notice("nan", text, "error", step=step.step)
        return None


def _is_bad(step: StepResult) -> bool:
    """Whether loss or norm is not finite. Under fp16 an infinite norm is part of finding the loss scale."""
    if step.loss is not None and not math.isfinite(step.loss):
        return True
    return step.loss_scale is None and step.grad_norm is not None and not math.isfinite(step.grad_norm)


def _over(notice: Notice, state: RunState) -> Notice:
    text = f"over at step {state.step}"
    if notice.is_alert and (alert := state.alerts.get(notice.what)) is not None and alert.text:
        text = f"{text}; {alert.text}"
    if notice.is_verdict and state.verdict is not None:
        text = f"{text}; {state.verdict.text}"
    return replace(notice, text=text, severity="info", step=state.step, over=True)


def _end(state: RunState) -> Notice:
    status = state.status
    assert status is not None
    good = status.state in ("finished", "stopped")
    reason = with_exit_code(status.reason, status.exit_code if status.state == "failed" else None)
    text = f"{status.state} at step {status.step}" + (f": {reason}" if reason else "")
    return Notice(status.state, text, "info" if good else "error", _failed(state), status.step)


def _failed(state: RunState) -> tuple[int, ...]:
    rank = state.status.failed_rank if state.status is not None else None
    return () if rank is None else (rank,)
