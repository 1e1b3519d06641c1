"""The verdict on the run, published by the hub whenever it changes, so that every screen, the command line and the
recording have the same one. A change from or to a verdict that is bad news is an event, too."""

from __future__ import annotations

import asyncio
import time

from zerotop.hub.hub import Hub
from zerotop.state.timereport import time_report
from zerotop.verdict.finding import Finding
from zerotop.verdict.judge import Judge

LOOK_S = 0.5
REFRESH_S, CALM_REFRESH_S = 5.0, 30.0
"""How often the figures of a verdict that stays are published anew; of one that is no bad news more seldom."""
START_REFRESH_S = 1.0
"""How often what a start is at is published anew."""
REPORT_S = 5.0
"""How often the hub says where the time of the steps goes."""


class VerdictWatch:
    """Judges the run behind `hub`."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._judge = Judge()
        self._told: Finding | None = None
        self._told_s = 0.0
        self._since_wall_s = 0.0
        self._reported_s = -REPORT_S

    async def watch(self) -> None:
        """Look every half second, for ever."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Look once at `now_s`, a monotonic clock."""
        before, found = self._told, self._judge.look(self._hub.state, now_s)
        self._report_time(now_s)
        changed = not found.same_as(before)
        refresh_s = CALM_REFRESH_S if found.severity == "info" else REFRESH_S
        if found.what == "starting":
            refresh_s = START_REFRESH_S
        if not changed and (found == before or now_s - self._told_s < refresh_s):
            return
        if changed:
            self._since_wall_s = time.time()
        self._told, self._told_s = found, now_s
        self._hub.say(found.message(self._hub.state.step, self._since_wall_s))
        if not changed:
            return
        if found.severity != "info" and found.what != "failed":  # a failure has events of its own
            self._hub.event("verdict", found.text, found.severity, verdict=found.what, ranks=list(found.ranks))
        elif before is not None and before.severity != "info" and found.severity == "info":
            self._hub.event("verdict", f"over: {before.what}; {found.text}", verdict=found.what)

    def _report_time(self, now_s: float) -> None:
        if now_s - self._reported_s < REPORT_S or self._hub.status.state != "running":
            return
        report = time_report(self._hub.state)
        if report is not None and report != self._hub.state.time_report:
            self._reported_s = now_s
            self._hub.say(report)
