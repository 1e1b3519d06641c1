"""Writing state.json: in order, off the event loop, and also when the disk is full."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import write_json

NAME = "state.json"


def write_status(path: Path, status: RunStatus) -> None:
    """Replace state.json in the run directory `path`.

    If the disk has no room for a second file, or no inodes, the old content must not stay: the file is then overwritten
    in place, if necessary without the error's text. Raises OSError if that fails too.
    """
    try:
        write_json(path / NAME, status)
    except OSError:
        if not (path / NAME).exists():
            raise
        for kept in (status, status.model_copy(update={"error": ""})):
            try:
                _write_over(path / NAME, kept.model_dump_json(indent=1) + "\n")
                return
            except OSError:
                if kept is not status:
                    raise


def _write_over(path: Path, text: str) -> None:
    """Write into the blocks that the file already has; a reader may see half of it for a moment."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.pwrite(descriptor, data.ljust(os.fstat(descriptor).st_size), 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StatusFile:
    """Writes one status after the other in a thread of its own, which other slow disk work may share."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")

    def write(self, status: RunStatus) -> None:
        """Write it later, in order; returns at once."""
        self.disk.submit(self._write, status)

    async def written(self, status: RunStatus) -> None:
        """Write it, and return when it is on disk or the write has failed."""
        await asyncio.get_running_loop().run_in_executor(self.disk, self._write, status)

    def _write(self, status: RunStatus) -> None:
        try:
            write_status(self._path, status)
        except OSError as error:
            with contextlib.suppress(OSError):  # supervisor.log may lie on the same full disk
                print(f"can't write {NAME}: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wait for what is queued, and end the thread."""
        self.disk.shutdown()
