"""Makes a rank write the stacks of its threads on a signal, also if they hang in native code."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

from runtime.wire.rundir import STACKS_SIGNAL, rank_stacks


def register_stacks(logs: Path, rank: int) -> bool:
    """Make SIGUSR2 append the Python stacks of all threads to the rank's file in `logs` (the attempt's folder, which
    exists).

    faulthandler writes from the C signal handler, without the GIL or the interpreter. Call it before the script runs.
    Returns False, without effect, if the signal has a handler already.
    """
    if signal.getsignal(STACKS_SIGNAL) not in (signal.SIG_DFL, signal.SIG_IGN):
        return False
    # Never closed: the handler writes to this descriptor until the process ends.
    handle = os.open(rank_stacks(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(STACKS_SIGNAL, file=handle, all_threads=True, chain=False)
    return True
