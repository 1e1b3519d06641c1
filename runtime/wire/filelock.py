"""Advisory locks on open files. A lock belongs to the open file, so it is also held by processes that inherit the
descriptor, and is released when the last of them has closed it."""

from __future__ import annotations

import fcntl


def wait_lock(descriptor: int) -> None:
    """Lock an open file, when the process that has the lock lets go of it."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or folder without waiting. True: it is ours now; False: another process has the lock; None: the
    file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
