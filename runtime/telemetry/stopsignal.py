"""SIGUSR1 and SIGTERM in a rank: somebody's warning, which becomes a stop at the next step boundary.

Slurm signals every process of a step, and a machine that is shut down every process there is, so ranks get it beside
the supervisor. The supervisor starts them with both signals blocked: torchrun, which never unblocks them, would end the
ranks for its own SIGTERM, and what comes before a rank's handlers are there waits for them.

[Note: whose SIGTERM]
torchrun sends one to the ranks that are left when one has failed, and so does the supervisor when it ends a run: these
mean now, for there is nobody to make a checkpoint with. Only the sender tells the one from the other, and Python's
handlers aren't told: csrc/sigterm.cpp is. Without it (no compiler) SIGTERM ends a rank, whoever sent it. Helpers that a
rank forks inherit the handler, and only their rank's SIGTERM ends them: it needs its DataLoader's workers to reach the
next boundary.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from runtime.telemetry.inbox import Inbox
from runtime.wire.rundir import SUPERVISOR_VARIABLE

_lock = threading.RLock()
"""Re-entrant: a handler may run while its own thread is in here."""
_inbox: Inbox | None = None
_heard = False
"""SIGTERM asks for a stop here."""
_early = ""
"""What came before there was an inbox."""


def listen() -> None:
    """Take both signals from now on, unless somebody has a handler for them already. Call it in the main thread, before
    a script runs: a handler that the script sets later replaces this one."""
    if signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN):
        signal.signal(signal.SIGUSR1, _note)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        _listen_to_sigterm()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1, signal.SIGTERM})


def spare_data_workers() -> None:
    """Torch gives a DataLoader's workers a handler of their own, with which anybody's SIGTERM ends them: replace it in
    those that are forked from now on. Call it after `listen`."""
    if not _heard:
        return
    from torch.utils.data._utils import signal_handling

    usual = signal_handling._set_worker_signal_handlers

    def set_handlers(*arguments: Any) -> None:
        usual(*arguments)
        _hear_sigterm(-1)

    signal_handling._set_worker_signal_handlers = set_handlers


def deliver_to(inbox: Inbox) -> None:
    """Where the request goes; one that came before goes there at once."""
    global _inbox
    with _lock:
        _inbox = inbox
        if _early:
            inbox.request_stop(_early)


def _listen_to_sigterm() -> None:
    """See [Note: whose SIGTERM]."""
    global _heard
    heard, told = os.pipe()
    os.set_blocking(told, False)
    _heard = _hear_sigterm(told)
    if not _heard:
        os.close(heard)
        os.close(told)
        return
    threading.Thread(target=_hear, args=(heard,), name="zerotop-sigterm", daemon=True).start()


def _hear_sigterm(descriptor: int) -> bool:
    from runtime.native.loading import term

    try:
        return term().zt_hear_sigterm(descriptor, int(os.environ.get(SUPERVISOR_VARIABLE, "0"))) == 0
    except ImportError:
        return False


def _hear(descriptor: int) -> None:
    while os.read(descriptor, 1):
        _request("SIGTERM")


def _note(number: int, frame: FrameType | None) -> None:
    _request(signal.Signals(number).name)


def _request(reason: str) -> None:
    global _early
    with _lock:
        if _inbox is None:
            _early = reason
        else:
            _inbox.request_stop(reason)
