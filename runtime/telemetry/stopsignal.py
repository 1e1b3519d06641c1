"""SIGUSR1 in a rank: a batch system's warning, which becomes a stop at the next step boundary.

Slurm signals every process of a step, so ranks get it beside the supervisor. The supervisor starts them with the signal
blocked: without a handler it would end them, and what comes before the handler is there waits for it.
"""

from __future__ import annotations

import signal
from types import FrameType

from runtime.telemetry.inbox import Inbox

REASON = "SIGUSR1"

_inbox: Inbox | None = None
_early = False
"""It came before there was an inbox."""


def listen() -> None:
    """Take SIGUSR1 from now on, unless somebody has a handler for it already. Call it in the main thread, before a
    script runs: a handler that the script sets later replaces this one."""
    if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGUSR1, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def deliver_to(inbox: Inbox) -> None:
    """Where the request goes; one that came before goes there at once."""
    global _inbox
    _inbox = inbox
    if _early:
        inbox.request_stop(REASON)


def _note(number: int, frame: FrameType | None) -> None:
    global _early
    if _inbox is None:
        _early = True
    else:
        _inbox.request_stop(REASON)
