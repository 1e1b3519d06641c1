"""SIGUSR1, SIGTERM and SIGHUP in a rank: a batch system's, a machine's or a person's word to the whole run.

Slurm signals every process of a step, and a machine that is shut down every process there is, so ranks get them beside
the supervisor. A rank hands SIGUSR1 and SIGTERM on to the supervisor, which stops the run after a checkpoint: one way,
in which all ranks agree, with an event and a deadline, also in a run that is paused or hangs. The supervisor starts the
ranks with these signals blocked: torchrun, which never unblocks them, would end the ranks for them, and what comes
before a rank's handlers are there waits for them.

[Note: whose SIGTERM]
torchrun sends one to the ranks that are left when one has failed, and so does the supervisor when it ends a run: these
mean now, for there is nobody to make a checkpoint with. Only the sender tells the one from the other, and Python's
handlers aren't told: csrc/sigterm.cpp is. Without it (no compiler) SIGTERM ends a rank, whoever sent it. Helpers that a
rank forks inherit the handler, and only the rank's SIGTERM ends them: it needs its DataLoader's workers to reach the
next boundary. (Workers that are spawned or come from a fork server are new programs, with handlers of their own.)
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

from runtime.wire.rundir import BLOCKED_SIGNALS, SUPERVISOR_VARIABLE

_listens = False
"""SIGTERM is handed on here."""


def listen() -> None:
    """Take the signals from now on, unless somebody has a handler for them already. Call it in the main thread, before
    a script runs: a handler that the script sets later replaces this one."""
    global _listens
    supervisor = int(os.environ.get(SUPERVISOR_VARIABLE, "0"))
    if supervisor and (descriptor := _descriptor_of(supervisor)) is not None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            _listens = _hand_on(signal.SIGTERM, descriptor, supervisor)
        ours = signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN)
        if ours and not _hand_on(signal.SIGUSR1, descriptor, supervisor):
            signal.signal(signal.SIGUSR1, _to(supervisor))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # as the supervisor does: no terminal is ours
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)


def spare_data_workers() -> None:
    """Torch gives a DataLoader's workers a handler of their own, with which anybody's SIGTERM ends them: replace it in
    those that are forked from now on. Call it after `listen`."""
    if not _listens:
        return
    from torch.utils.data._utils import signal_handling

    from runtime.native.loading import term

    usual = signal_handling._set_worker_signal_handlers

    def set_handlers(*arguments: Any) -> None:
        usual(*arguments)
        term().zt_in_data_worker()

    signal_handling._set_worker_signal_handlers = set_handlers


def supervisor_is_watched() -> None:
    """From now on a rank without a supervisor saves and ends by itself: what asks it to needs no answer. Before that,
    such a SIGTERM ends it."""
    if _listens:
        from runtime.native.loading import term

        term().zt_supervisor_is_watched()


def _descriptor_of(pid: int) -> int | None:
    """A pidfd, or -1 where the kernel has none; None: there is no such process."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except (OSError, AttributeError):
        return -1


def _hand_on(number: signal.Signals, descriptor: int, supervisor: int) -> bool:
    from runtime.native.loading import term

    try:
        return term().zt_hand_on(number, descriptor, supervisor) == 0
    except ImportError:
        return False


def _to(supervisor: int) -> Any:
    """What hands a signal on without csrc/sigterm.cpp: when the main thread comes to it."""

    def send(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, number)

    return send
