"""What SIGTERM and SIGUSR1 of a batch system ask for: a stop with a deadline."""

from __future__ import annotations

import os
import time
import uuid

from runtime.wire.messages import Command

DEADLINE_VARIABLE = "ZEROTOP_STOP_DEADLINE_S"
DEADLINE_S = 60.0
"""After such a signal the run has so long to stop after a checkpoint; then it is aborted."""


def stop_by_signal(name: str) -> Command:
    """The same whoever got the signal: the supervisor, a rank that handed it on, or `zerotop launch --no-screen`."""
    arguments = {"deadline_s": _deadline_s()}
    return Command(id=uuid.uuid4().hex, name="stop", who=name, arguments=arguments, wall_s=time.time())


def _deadline_s() -> float:
    try:
        return max(0.0, float(os.environ[DEADLINE_VARIABLE]))
    except (KeyError, ValueError):
        return DEADLINE_S
