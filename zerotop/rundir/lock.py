"""The lock of a run: who may write to its directory. RUN/lock is held by the supervisor and by torchrun.

The lock belongs to an open file, not to a process: launch takes it, the supervisor and torchrun inherit the descriptor,
and it is free once the last of them has ended. So a killed supervisor does not free it while ranks are still saving.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from runtime.telemetry.orphan import grace_s
from runtime.wire.filelock import try_lock
from zerotop.format import duration_text
from zerotop.rundir.paths import LOCK_NAME, RunError

POLL_S = 0.2
MARGIN_S = 5.0
"""Added to the time that orphaned ranks have to save: their exit takes time too."""


def take(folder: Path) -> int | None:
    """A descriptor that holds the lock of the run in `folder`; None if another process holds it. Raises RunError if
    the file cannot be opened."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RunError(f"can't open {folder / LOCK_NAME}: {error.strerror}") from None
    if try_lock(descriptor) is False:
        os.close(descriptor)
        return None
    return descriptor  # on a file system without locks the run is not protected


def take_new(folder: Path) -> int:
    """The lock of a directory that was just created. Raises RunError if another process has it."""
    descriptor = take(folder)
    if descriptor is None:
        raise RunError(f"{folder} was only just made, and another process has locked it: choose another --name")
    return descriptor


def take_patiently(folder: Path, *, check: Callable[[], object], tell: Callable[[str], None]) -> int:
    """The lock, waiting for the ranks of an attempt whose supervisor is gone: they have a grace period to save.

    `check` is called before every try and may raise. Raises RunError that names the holder after the grace period.
    """
    try:
        patience_s = grace_s() + MARGIN_S
    except ValueError as error:
        raise RunError(str(error)) from None
    deadline, told = time.monotonic() + patience_s, False
    while True:
        check()
        descriptor = take(folder)
        if descriptor is not None:
            return descriptor
        if time.monotonic() > deadline:
            raise RunError(f"{folder.name} can't be resumed yet: {_held_by(folder)}")
        if not told:
            told = True
            tell(
                f"{folder.name}: ranks of the previous attempt are still saving; "
                f"waiting for up to {duration_text(patience_s)}"
            )
        time.sleep(POLL_S)


def _held_by(folder: Path) -> str:
    found = holders(folder)
    if not found:
        return f"{folder / LOCK_NAME} is held by a process on another machine, or of another user"
    names = ", ".join(f"{process.pid} ({_command_line(process)})" for process in found[:4])
    return (
        f"{folder / LOCK_NAME} is held by process {names}, left from an earlier attempt; "
        "wait for its end, or end it with kill"
    )


def holders(folder: Path) -> list[psutil.Process]:
    """This user's processes that have the lock file open."""
    path = os.path.realpath(folder / LOCK_NAME)
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(file.path == path for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is another user's
    return found


def _command_line(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return "ended just now"
    text = " ".join(words)
    return text if len(text) <= 80 else f"{text[:77]}..."
