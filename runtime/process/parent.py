"""A child process that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int) -> bool:
    """Make the kernel send this process `signal_number` when the thread that started it ends (prctl(2)).

    Call it early, from the main thread. Returns False, without effect, on other systems than Linux. If the parent ends
    during the call, the signal is sent at once.
    """
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)
    return True
