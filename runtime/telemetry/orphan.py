"""How a rank detects that its supervisor is gone, and ends: no process of a run outlives the supervisor."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

import psutil

from runtime.process.forked import Owner

GRACE_VARIABLE = "ZEROTOP_ORPHAN_GRACE_S"
DEFAULT_GRACE_S = 60.0
FALLBACK_INTERVAL_S = 1.0


def grace_s() -> float:
    """Seconds that an orphaned rank has to save a checkpoint and end. Raises ValueError if ZEROTOP_ORPHAN_GRACE_S is
    not a number of seconds."""
    text = os.environ.get(GRACE_VARIABLE, "")
    if not text:
        return DEFAULT_GRACE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{GRACE_VARIABLE}: expected a number of seconds from 0, got {text!r}")
    return seconds


class SupervisorWatch:
    """A thread that calls `on_gone` when process `pid` ends, and ends this process if it still runs after `grace_s`.

    It is a thread of its own because it must work when all others hang. It waits on a pidfd; if the kernel refuses one,
    it checks pid and start time once a second.
    """

    def __init__(self, pid: int, on_gone: Callable[[], None], grace_s: float) -> None:
        self.pid = pid
        self.gone = False
        self._on_gone = on_gone
        self._grace_s = grace_s
        self._owner = Owner()
        self._stopped = threading.Event()
        self._stop_read, self._stop_write = os.pipe()
        self._pidfd: int | None = None
        self._process: psutil.Process | None = None
        try:
            # Opened here and not in the thread: from now on the pid can't be mistaken for a later process.
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self.gone = True
        except (OSError, AttributeError):
            try:
                self._process = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self.gone = True
        self._thread = threading.Thread(target=self._run, name="zerotop-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and with it the grace timer. Does nothing in a forked child, whose write to the shared pipe
        would stop the parent's watch."""
        if self._stopped.is_set() or not self._owner.is_here:
            return
        self._stopped.set()
        os.write(self._stop_write, b"\0")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for descriptor in (self._stop_read, self._stop_write, self._pidfd):
            if descriptor is not None:
                os.close(descriptor)

    def _run(self) -> None:
        if not self.gone:
            self._wait()
        if self._stopped.is_set():
            return
        self.gone = True
        deadline = time.monotonic() + self._grace_s
        self._on_gone()
        if self._stopped.wait(max(0.0, deadline - time.monotonic())):
            return
        cause = f"the supervisor (pid {self.pid}) is gone"
        words = f"zerotop: {cause} and this rank did not stop within {self._grace_s:g} s: it ends now\n"
        try:
            # stderr may be a full pipe that is no longer read: don't block on it.
            if select.select([], [2], [], 0)[1]:
                os.write(2, words.encode())
        finally:
            os._exit(1)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        if self._pidfd is not None:
            poll.register(self._pidfd, select.POLLIN)
            poll.poll()
            return
        assert self._process is not None
        while not poll.poll(FALLBACK_INTERVAL_S * 1000):
            if not _is_alive(self._process):
                return


def _is_alive(process: psutil.Process) -> bool:
    try:
        # is_running() compares start times. A zombie has ended, too.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
