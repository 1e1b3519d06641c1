"""Makes a rank write the stacks of its threads on a signal, also if they hang in native code, and lets py-spy read the
rank."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

from runtime.wire.rundir import STACKS_SIGNAL, rank_stacks

_PR_SET_PTRACER = 0x59616D61


def allow_tracing(pid: int) -> bool:
    """Allow process `pid` and its descendants to read this process (prctl(2), for kernels with Yama).

    py-spy is a child of the supervisor and so no ancestor of a rank, and kernel.yama.ptrace_scope=1, the default of
    many distributions, lets only ancestors read a process. Returns False, without effect, where there is no such rule.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0) == 0)


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
