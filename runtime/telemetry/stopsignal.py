"""SIGUSR1, SIGTERM and SIGHUP in a rank, sent to the run by a batch system, a shutdown or a person.

Slurm signals every process of a step, and a shutdown every process of the machine, so the ranks get these signals
beside the supervisor. A rank forwards SIGUSR1 and SIGTERM to the supervisor, which stops the run after a checkpoint on
which all ranks agree, with an event and a deadline, also if the run is paused or hangs. The supervisor starts torchrun
and the ranks with these signals blocked: torchrun never unblocks them, and would otherwise end the ranks; in a rank
they stay pending until its handlers are set.

[Note: whose SIGTERM]
torchrun sends SIGTERM to the remaining ranks when one has failed, and so does the supervisor when it ends a run: these
must end the rank at once, because a checkpoint is impossible. Only the sender's pid tells them apart, which Python's
handlers don't get, but csrc/sigterm.cpp does. If that is not built, every SIGTERM ends a rank. Processes that a rank
forks inherit the handler, and only SIGTERM from the rank ends them, because it needs its DataLoader's workers to reach
the next boundary. (Workers that are spawned or come from a fork server are new programs with handlers of their own.)
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

from runtime.wire.rundir import BLOCKED_SIGNALS, SUPERVISOR_VARIABLE

_forwards_sigterm = False
"""Whether this process forwards SIGTERM."""


def listen() -> None:
    """Handle the signals, except those that have a handler already. Call it in the main thread before the script runs,
    whose own handlers replace these."""
    global _forwards_sigterm
    supervisor = int(os.environ.get(SUPERVISOR_VARIABLE, "0"))
    if supervisor and (descriptor := _descriptor_of(supervisor)) is not None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            _forwards_sigterm = _forward_signal(signal.SIGTERM, descriptor, supervisor)
        ours = signal.getsignal(signal.SIGUSR1) in (signal.SIG_DFL, signal.SIG_IGN)
        if ours and not _forward_signal(signal.SIGUSR1, descriptor, supervisor):
            signal.signal(signal.SIGUSR1, _forwarding_handler(supervisor))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # as the supervisor does: no terminal is ours
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)


def spare_data_workers() -> None:
    """Replace torch's handler in DataLoader workers that are forked from now on, with which any SIGTERM would end them.
    Call it after `listen`."""
    if not _forwards_sigterm:
        return
    from torch.utils.data._utils import signal_handling

    from runtime.native.loading import term

    usual = signal_handling._set_worker_signal_handlers

    def set_handlers(*arguments: Any) -> None:
        usual(*arguments)
        term().zt_in_data_worker()

    signal_handling._set_worker_signal_handlers = set_handlers


def supervisor_is_watched() -> None:
    """A watch for the supervisor's end now stops this rank after a checkpoint, so a SIGTERM that can't be forwarded
    because the supervisor is gone is ignored; before, it ends the rank."""
    if _forwards_sigterm:
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


def _forward_signal(number: signal.Signals, descriptor: int, supervisor: int) -> bool:
    from runtime.native.loading import term

    try:
        return term().zt_hand_on(number, descriptor, supervisor) == 0
    except ImportError:
        return False


def _forwarding_handler(supervisor: int) -> Any:
    """A Python handler that forwards a signal, for when csrc/sigterm.cpp is not built."""

    def send(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, number)

    return send
