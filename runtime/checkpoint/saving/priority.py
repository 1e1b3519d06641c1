"""CPU and disk priority of a writer process, set by its rank: idle while training computes, normal while training
waits for it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import psutil

STARTING_NICE = 10
"""Niceness of a writer that starts. Not idle yet: imports at idle priority would take minutes on busy CPUs."""


class Priority:
    """Priority of one process with all its threads. Its methods may be called from any thread.

    Where the system has no idle priority (it is Linux's), nothing changes. Only root may raise what has been lowered:
    for other users the process keeps idle priority, which is slow only where every CPU is busy with other work."""

    def __init__(self, pid: int) -> None:
        """pid: a process that has just been started. Its niceness is raised."""
        self._pid = pid
        self._lock = threading.Lock()
        self._idle = False
        self._waiting = 0
        self._apply()

    def lower(self) -> None:
        """Idle priority from now on, as soon as nobody waits."""
        with self._lock:
            self._idle = True
            self._apply()

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Normal priority meanwhile; may be entered several times at once."""
        with self._lock:
            self._waiting += 1
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                self._apply()

    def _apply(self) -> None:
        with contextlib.suppress(OSError, AttributeError, psutil.Error):  # gone, not permitted, or not Linux
            if self._waiting:
                self._set(os.SCHED_OTHER, 0, psutil.IOPRIO_CLASS_NONE)
            elif self._idle:
                self._set(os.SCHED_IDLE, STARTING_NICE, psutil.IOPRIO_CLASS_IDLE)
            else:
                self._set(os.SCHED_OTHER, STARTING_NICE, psutil.IOPRIO_CLASS_NONE)

    def _set(self, policy: int, nice: int, disk: int) -> None:
        """Set all threads, and then those that have been started meanwhile: they inherit from one of the others."""
        done: set[str] = set()
        while left := {*os.listdir(f"/proc/{self._pid}/task")} - done:
            for thread in left:
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has ended
                    os.sched_setscheduler(int(thread), policy, os.sched_param(0))
                    os.setpriority(os.PRIO_PROCESS, int(thread), nice)
                    psutil.Process(int(thread)).ionice(disk)
            done |= left
