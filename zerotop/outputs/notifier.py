"""Decides who is told what, and how often. What is told is JSON that Slack (`text`) and Discord (`content`) show as it
is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.config.outputs import NotifyConfig
from zerotop.clean import clean
from zerotop.outputs.conditions import Notice
from zerotop.outputs.delivery import Receiver, command, webhook, webhook_name

LONGEST_TEXT = 1500
"""Characters. Discord takes 2000."""
_SIGNS = {"info": "✔", "warning": "▲", "error": "✖"}


def document(run: str, host: str, notice: Notice, more: int = 0, wall_s: float | None = None) -> dict[str, Any]:
    """What receivers get (docs/alerts.md). `more`: how many notices about the same thing were not sent before it."""
    state = "over" if notice.over else "ended" if notice.ends_run else "firing"
    text = clean(notice.text)
    if len(text) > LONGEST_TEXT:
        text = text[: LONGEST_TEXT - 1] + "…"
    if more:
        text += f" ({more} more since the last notification)"
    title = clean(f"{run}: {notice.what}{' over' if notice.over else ''}").replace("\n", " ")
    message = f"{_SIGNS[notice.severity]} {title}" + (f": {text}" if text else "")
    return {
        "text": message,
        "content": message,
        "title": title,
        "description": text,
        "run": run,
        "host": host,
        "what": notice.what,
        "state": state,
        "severity": notice.severity,
        "step": notice.step,
        "ranks": list(notice.ranks),
        "suppressed": more,
        "wall_s": time.time() if wall_s is None else wall_s,
    }


@dataclass
class _Told:
    """What one receiver was told about one thing."""

    at_s: float = float("-inf")
    suppressed: int = 0
    firing: bool = False
    """It was told that it has begun, and not yet that it is over."""


class Notifier:
    """One receiver with its settings."""

    def __init__(
        self,
        config: NotifyConfig,
        run: str,
        host: str,
        receiver: Receiver,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._run, self._host = run, host
        self._receiver = receiver
        self._report = report
        self._clock = clock
        self._told: dict[str, _Told] = {}
        self._dropped = 0

    def tell(self, notices: Iterable[Notice]) -> None:
        """Queue what this receiver wants of `notices`, within its rate. Never waits."""
        for notice in notices:
            if self._wants(notice):
                self._consider(notice)

    def _wants(self, notice: Notice) -> bool:
        on = self._config.on
        return notice.what in on or (notice.is_alert and "alert" in on) or (notice.is_verdict and "verdict" in on)

    def _consider(self, notice: Notice) -> None:
        told = self._told.setdefault(notice.what, _Told())
        if notice.over:
            if self._config.resolved and told.firing:
                self._put(notice, 0)
            told.firing = False
            return
        now_s = self._clock()
        if not notice.ends_run and now_s - told.at_s < self._config.every:
            told.suppressed += 1
            return
        more, told.suppressed = told.suppressed, 0
        told.at_s, told.firing = now_s, True
        self._put(notice, more)

    def _put(self, notice: Notice, more: int) -> None:
        if not self._receiver.put(document(self._run, self._host, notice, more)):
            self._dropped += 1
            if self._dropped == 1:
                self._report(f"{self._receiver.name} does not keep up: notifications are dropped")

    def close(self, deadline_s: float) -> None:
        """Deliver what is queued, until `deadline_s` on the monotonic clock."""
        self._receiver.close(deadline_s)


def make_notifier(
    config: NotifyConfig, run: str, host: str, report: Callable[[str], None], environment: Mapping[str, str]
) -> Notifier:
    """The notifier of one entry of zerotop.notify, checked at launch. Raises KeyError if its environment variable has
    gone."""
    if config.webhook is not None:
        named = config.webhook.startswith("$")
        url = environment[config.webhook[1:].strip("{}")] if named else config.webhook
        receiver = Receiver(webhook_name(url), webhook(url), report)
    else:
        assert config.command is not None
        receiver = Receiver(f"command {config.command[0]}", command(config.command), report)
    return Notifier(config, run, host, receiver, report)
