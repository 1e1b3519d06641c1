"""Waiting for conditions, and how patient tests are.

A deadline in a test is a number of seconds for an idle two-core machine; `until` and `patient` multiply it by
ZEROTOP_TEST_PATIENCE (1 unless the environment says otherwise), as tests/conftest.py does with pytest's own timeout
of each test. ZEROTOP_TEST_PATIENCE=4 is for a machine that other work shares.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

PATIENCE = float(os.environ.get("ZEROTOP_TEST_PATIENCE", "1"))
DEADLINE_S = 20.0
"""Unless a test says otherwise; not multiplied yet."""

Found = TypeVar("Found")


def patient(seconds: float) -> float:
    """A deadline for this machine, from one for an idle machine."""
    return seconds * PATIENCE


def until(
    condition: Callable[[], Found],
    what: str | Callable[[], str] = "the condition",
    deadline_s: float = DEADLINE_S,
    *,
    pause: Callable[[float], Any] = time.sleep,
    error: type[Exception] = AssertionError,
) -> Found:
    """Look until `condition()` is true, and return what it gave; fail with `what` was awaited after the deadline.

    `pause(seconds)` runs between two looks: the wait() of a source returns as soon as something arrives.
    """
    end = time.monotonic() + patient(deadline_s)
    while not (found := condition()):
        if time.monotonic() > end:
            raise error(_too_late(what, deadline_s))
        pause(0.02)
    return found


async def until_async(
    condition: Callable[[], Found],
    what: str | Callable[[], str] = "the condition",
    deadline_s: float = DEADLINE_S,
    *,
    between: Callable[[], Awaitable[Any]] | None = None,
) -> Found:
    """`until` for tests with an event loop. `between` runs between two looks, as for a message that is sent again."""
    end = time.monotonic() + patient(deadline_s)
    while not (found := condition()):
        assert time.monotonic() <= end, _too_late(what, deadline_s)
        if between is not None:
            await between()
        await asyncio.sleep(0.01)
    return found


def _too_late(what: str | Callable[[], str], deadline_s: float) -> str:
    return f"not within {patient(deadline_s):g} s: {what() if callable(what) else what}"
