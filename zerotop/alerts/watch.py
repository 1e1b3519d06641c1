"""Checks the rules of zerotop.alerts once a second. What becomes of each is a message for every screen; an alert that
fires or is over is an event, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from runtime.config.outputs import AlertConfig
from runtime.wire.judgement import Alert, Verdict
from runtime.wire.messages import LIVE_STATES
from zerotop.alerts.conditions import Match, Moment, VerdictChanges
from zerotop.alerts.rules import Rule, parse_rule
from zerotop.format import duration_text
from zerotop.hub.hub import Hub
from zerotop.state.run import RunState

LOOK_S = 1.0
RESOLVE_S = 10.0
"""A firing alert without `until` is over when its condition has not held for this long: a value near its threshold
crosses it again and again."""
REFRESH_S = 30.0
"""How often the figures of an alert that fires are published anew."""


class AlertWatch:
    """The alerts of one run, over all its attempts."""

    def __init__(self, hub: Hub, alerts: Iterable[AlertConfig], clock: Callable[[], float] = time.monotonic) -> None:
        """The rules have been checked at launch."""
        self._hub = hub
        self._clock = clock
        self._alerts = [_Tracked(alert.name or alert.rule, parse_rule(alert.rule), alert.severity) for alert in alerts]
        self._history = History()

    async def watch(self) -> None:
        """Check once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Check every rule once."""
        state = self._hub.state
        if not self._alerts or state.state_name not in LIVE_STATES:
            return
        now_s = self._clock()
        moment = self._history.moment(state, now_s)
        for alert in self._alerts:
            before = alert.state
            if not alert.look(moment, now_s):
                continue
            self._hub.say(alert.message(state.step))
            if alert.state == "firing" and (before != "firing" or alert.again):
                self._tell(alert, alert.text, alert.severity)
            elif alert.state == "resolved":
                lasted = duration_text(now_s - alert.fired_s)
                self._tell(alert, f"resolved after {lasted}" + (f"; {alert.text}" if alert.text else ""), "info")

    def _tell(self, alert: _Tracked, text: str, severity: str) -> None:
        self._hub.event("alert", f"{alert.name}: {text}", severity, alert=alert.name, alert_state=alert.state,
                        ranks=list(alert.ranks))  # fmt: skip


class History:
    """What conditions need to know of the time before: since when no step has been taken, and the verdict's last
    change."""

    def __init__(self) -> None:
        self._step: tuple[int, int] | None = None
        self._moved_s = 0.0
        self._verdict: Verdict | None = None
        self._before: Verdict | None = None
        self._after: Verdict | None = None
        self._changed_s: float | None = None

    def moment(self, state: RunState, now_s: float) -> Moment:
        """The moment `now_s` (a monotonic clock) of the run."""
        step = (state.status.attempt if state.status else 0, state.step)
        expected = _takes_steps(state)
        if step != self._step or not expected:
            self._step, self._moved_s = step, now_s
        verdict = state.verdict
        if verdict is not None:
            last = self._verdict
            if last is not None and _matter(verdict) != _matter(last):
                self._before, self._after, self._changed_s = last, verdict, now_s
            self._verdict = verdict
        return Moment(
            state,
            still_s=now_s - self._moved_s if expected else None,
            before=self._before,
            after=self._after,
            changed_s=None if self._changed_s is None else now_s - self._changed_s,
        )


def _takes_steps(state: RunState) -> bool:
    """Whether a step is to be expected: not in a pause, and not of ranks that never said a word while the run counts as
    running."""
    name = state.state_name
    hello = state.hello
    return name in ("starting", "restarting") or (name == "running" and hello is not None and hello.counts_steps)


def _matter(verdict: Verdict) -> tuple[object, ...]:
    """What is wrong, and whose fault it is. That nothing is has many names: healthy, a checkpoint, a pause."""
    return () if verdict.severity == "info" else (verdict.what, *verdict.ranks)


@dataclass
class _Tracked:
    """One alert and its state."""

    name: str
    rule: Rule
    severity: Literal["warning", "error"]
    state: Literal["inactive", "pending", "firing", "resolved"] = "inactive"
    text: str = ""
    ranks: tuple[int, ...] = ()
    value: float | None = None
    again: bool = False
    """It was firing already, and something else is the matter now."""
    fired_s: float = 0.0
    _since_s: float = field(default=0.0)
    _since_wall_s: float = field(default=0.0)
    _held_s: float = field(default=0.0)
    _told_s: float = field(default=0.0)
    _mark: object = None

    def look(self, moment: Moment, now_s: float) -> bool:
        """Check once; True if there is something to publish."""
        found = self.rule.condition.look(moment)
        self.again = False
        if self.state == "firing":
            return self._look_firing(moment, found, now_s)
        if found is None:
            return self._enter("inactive", None, now_s) if self.state == "pending" else False
        if self.state != "pending":
            self._since_s = now_s
            if self.rule.for_s > 0:
                return self._enter("pending", found, now_s)
        if now_s - self._since_s < self.rule.for_s:
            self._take(found)
            return False
        self.fired_s = now_s
        return self._enter("firing", found, now_s)

    def _look_firing(self, moment: Moment, found: Match | None, now_s: float) -> bool:
        if found is not None:
            self._held_s = now_s
        if self.rule.until is not None:
            over = self.rule.until.look(moment) is not None
        else:
            # A change is a moment, and its own memory is how long it lasts.
            patience = 0.0 if isinstance(self.rule.condition, VerdictChanges) else RESOLVE_S
            over = found is None and now_s - self._held_s >= patience
        if over:
            self._enter("resolved", None, now_s)
            self.text = self.rule.condition.now(moment)
            return True
        if found is None:
            return False
        self.again = found.mark != self._mark
        self._take(found)
        if self.again:
            self._since_wall_s = time.time()
        if self.again or now_s - self._told_s >= REFRESH_S:
            self._told_s = now_s
            return True
        return False

    def _enter(
        self, state: Literal["inactive", "pending", "firing", "resolved"], found: Match | None, now_s: float
    ) -> bool:
        self.state, self._since_wall_s = state, time.time()
        self._held_s = self._told_s = now_s
        self._take(found or Match(""))
        return True

    def _take(self, found: Match) -> None:
        self.text, self.ranks, self.value, self._mark = found.text, found.ranks, found.value, found.mark

    def message(self, step: int) -> Alert:
        """As the hub publishes it."""
        return Alert(
            name=self.name,
            rule=self.rule.text,
            state=self.state,
            severity=self.severity,
            ranks=list(self.ranks),
            text=self.text,
            value=self.value,
            step=step,
            since_wall_s=self._since_wall_s,
        )
