"""`engine.monitor`: figures that a script reports by DeepSpeed's call become lines of the run's log."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

log = logging.getLogger("runtime.script")


class ScriptMonitor:
    """Takes a script's own figures. The engine's (loss, learning rate, ...) are recorded without it."""

    enabled = True

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def write_events(self, event_list: Iterable[tuple[str, Any, Any]]) -> None:
        """Log (name, value, x) triples, one line for each x (a step or a number of samples), on rank 0 only. value: a
        number or a tensor with one element."""
        if self._rank != 0:
            return
        lines: dict[Any, list[str]] = {}
        for name, value, x, *_ in event_list:
            lines.setdefault(x, []).append(f"{name} {float(value):.6g}")
        for x, figures in lines.items():
            log.info(f"at {x}: {', '.join(figures)}")
