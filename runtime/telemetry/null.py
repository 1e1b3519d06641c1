"""Telemetry of a process outside a run: the same methods, without effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from runtime.telemetry.device_phases import Marks
from runtime.telemetry.handler import LevelName
from runtime.telemetry.inbox import Inbox
from runtime.telemetry.recorder import Place
from runtime.wire.finetuning import DataReport, Evaluation
from runtime.wire.messages import Ack, Hello, Memory, PhaseName, StepResult

Severity = Literal["info", "warning", "error"]
Outcome = Literal["finished", "stopped", "aborted", "failed"]

_NOTHING: AbstractContextManager[None] = nullcontext()


class NullTelemetry:
    """Has the methods of `Telemetry`, which do nothing. `Telemetry.from_environment` returns it outside a run."""

    memory_source: Callable[[], Memory] | None = None
    completed_on_device: Callable[[], int] | None = None
    phase_ended: Callable[[PhaseName, int, int], None] | None = None
    hz: float = 0.0
    phase: PhaseName = "idle"
    place: Place = ("idle", 0)

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.log_handler: logging.Handler = logging.NullHandler()

    def start(self, hello: Hello) -> None:
        """Do nothing."""

    def enter(self, phase: PhaseName, step: int | None = None, micro_step: int | None = None) -> None:
        """Do nothing."""

    def follow_device(self, marks: Marks) -> None:
        """Do nothing."""

    def span(self, phase: PhaseName) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return _NOTHING

    def issued(self, op: str, nbytes: int) -> int:
        """Do nothing, and return 0."""
        return 0

    def completed(
        self,
        seq: int,
        op: str,
        nbytes: int,
        issue_ns: int,
        end_ns: int,
        wait_ns: int,
        place: Place | None = None,
    ) -> None:
        """Do nothing."""

    def step(self, result: StepResult) -> None:
        """Do nothing."""

    def event(
        self,
        what: str,
        text: str,
        *,
        severity: Severity = "info",
        step: int | None = None,
        data: dict[str, Any] | None = None,
        of_run: bool = False,
    ) -> None:
        """Do nothing."""

    def checkpoint_saved(self, step: int, path: str, *, seconds: float, blocked_ms: float) -> None:
        """Do nothing."""

    def data_report(self, report: DataReport) -> None:
        """Do nothing."""

    def evaluation(self, evaluation: Evaluation) -> None:
        """Do nothing."""

    def log(self, level: LevelName, text: str, logger: str = "runtime", wall_s: float | None = None) -> None:
        """Do nothing."""

    def ack(self, ack: Ack) -> None:
        """Do nothing."""

    def memory_changed(self) -> None:
        """Do nothing."""

    def goodbye(
        self, outcome: Outcome, step: int, error: str = "", fatal: bool = False, culprit: int | None = None
    ) -> None:
        """Do nothing."""

    def close(self, timeout_s: float = 2.0) -> None:
        """Do nothing."""
