"""Telemetry of a process that no run started: the same calls, no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from runtime.telemetry.handler import LevelName
from runtime.telemetry.inbox import Inbox
from runtime.wire.messages import Ack, Hello, Memory, PhaseName, StepResult

Severity = Literal["info", "warning", "error"]
Outcome = Literal["finished", "stopped", "aborted", "failed"]

_NOTHING: AbstractContextManager[None] = nullcontext()


class NullTelemetry:
    """What `Telemetry.from_environment` gives outside a run. Its inbox stays empty."""

    memory_source: Callable[[], Memory] | None = None
    hz: float = 0.0

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.log_handler: logging.Handler = logging.NullHandler()

    def start(self, hello: Hello) -> None: ...

    def enter(self, phase: PhaseName, step: int | None = None, micro_step: int | None = None) -> None: ...

    def span(self, phase: PhaseName) -> AbstractContextManager[None]:
        return _NOTHING

    def issued(self, op: str, nbytes: int) -> int:
        return 0

    def completed(self, seq: int, op: str, nbytes: int, issue_ns: int, end_ns: int, wait_ns: int) -> None: ...

    def step(self, result: StepResult) -> None: ...

    def event(
        self,
        what: str,
        text: str,
        *,
        severity: Severity = "info",
        step: int | None = None,
        data: dict[str, Any] | None = None,
        of_run: bool = False,
    ) -> None: ...

    def checkpoint_saved(self, step: int, path: str, *, seconds: float, blocked_ms: float) -> None: ...

    def log(self, level: LevelName, text: str, logger: str = "runtime", wall_s: float | None = None) -> None: ...

    def ack(self, ack: Ack) -> None: ...

    def memory_changed(self) -> None: ...

    def goodbye(
        self, outcome: Outcome, step: int, error: str = "", fatal: bool = False, culprit: int | None = None
    ) -> None: ...

    def close(self, timeout_s: float = 2.0) -> None: ...
