"""The processes of a run. The supervisor keeps each one as its descendant, so that it can end all of them and
nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> bool:
    """Make orphaned descendants our children instead of those of init. False where the kernel does not support it
    (not Linux)."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def detach(log: str) -> None:
    """Leave the terminal's session and the parent process: fork once more, stdin from /dev/null, stdout and stderr to
    `log`.

    Call it before any thread starts. The caller must be a session leader (Popen(start_new_session=True)), so that the
    second process is none and can never get a controlling terminal.
    """
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


def descendants(spare: Collection[int] = ()) -> list[psutil.Process]:
    """All living processes below this one, without the children `spare` and what is below them. psutil compares start
    times before it sends a signal, so a reused process id is safe."""
    found = []
    me = psutil.Process()
    spared = set(spare)
    for child in me.children() if spared else ():
        if child.pid in spared:
            with contextlib.suppress(psutil.NoSuchProcess):
                spared.update(process.pid for process in child.children(recursive=True))
    for process in me.children(recursive=True):
        if process.pid in spared:
            continue
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to each process that still lives."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def reap() -> dict[int, int]:
    """Reap ended children, adopted ones too: process id -> exit code, negative for a signal."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def kill_descendants(patience_s: float = 2.0, spare: Collection[int] = ()) -> int:
    """SIGKILL whatever is left below this process, until nothing is (a process may fork while it dies), without the
    children `spare` and what is below them. Returns how many could not be killed.

    A process in uninterruptible sleep (a wedged driver) can't be killed; after `patience_s` it is counted and left to
    the kernel.
    """
    deadline = time.monotonic() + patience_s
    while left := descendants(spare):
        if time.monotonic() > deadline:
            return len(left)
        send(left, signal.SIGKILL)
        reap()
        time.sleep(0.02)
    reap()
    return 0
