"""SIGTERM and SIGUSR1 of a batch system: a stop with a deadline."""

from __future__ import annotations

import os
import time
import uuid

from runtime.wire.messages import Command

DEADLINE_VARIABLE = "ZEROTOP_STOP_DEADLINE_S"
DEADLINE_S = 60.0
"""How long the run may take to write a checkpoint and stop after such a signal; then it is aborted."""


def stop_by_signal(name: str) -> Command:
    """The command that the signal called `name` stands for, whichever process got it: the supervisor, a rank that
    passes it on, or `zerotop launch --no-screen`."""
    arguments = {"deadline_s": _deadline_s()}
    return Command(id=uuid.uuid4().hex, name="stop", who=name, arguments=arguments, wall_s=time.time())


def _deadline_s() -> float:
    try:
        return max(0.0, float(os.environ[DEADLINE_VARIABLE]))
    except (KeyError, ValueError):
        return DEADLINE_S
