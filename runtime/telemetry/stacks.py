"""A rank that writes down where it stands when it is asked by a signal, also when its threads hang in native code."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

from runtime.wire.rundir import STACKS_SIGNAL, rank_stacks


def register_stacks(logs: Path, rank: int) -> bool:
    """From now on SIGUSR2 appends the Python stacks of all threads to the rank's file in `logs` (the attempt's folder,
    which exists).

    faulthandler writes from the C signal handler, without the GIL and without the interpreter's help. Call it before a
    script runs. False, and nothing happens, where somebody has a handler of their own already.
    """
    if signal.getsignal(STACKS_SIGNAL) not in (signal.SIG_DFL, signal.SIG_IGN):
        return False
    # Never closed: the handler writes to this number for as long as the process lives.
    handle = os.open(rank_stacks(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(STACKS_SIGNAL, file=handle, all_threads=True, chain=False)
    return True
