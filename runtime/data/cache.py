"""What is prepared once and kept: the folder for it, and the lock under which one process builds while others wait."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from platformdirs.unix import Unix

from runtime.wire.filelock import try_lock, wait_lock

Log = Callable[[str], None]


def cache_folder(kind: str = "tokens") -> Path:
    """Where prepared data is kept: $XDG_CACHE_HOME/zerotop/KIND, by default under ~/.cache."""
    return Unix("zerotop", appauthor=False).user_cache_path / kind


@contextlib.contextmanager
def build_lock(path: Path, log: Log, what: str) -> Iterator[bool]:
    """Hold the file lock under which `what` is built. Yields False if the file system has no locks: then every process
    builds, which is only slow."""
    with path.open("a") as file:
        locked = try_lock(file.fileno())
        if locked is False:
            log(f"waiting for {what} that another process is building")
            wait_lock(file.fileno())
        yield locked is not None


def part_name(path: Path) -> Path:
    """A name beside `path`, of this process's own, for what is not complete yet."""
    return path.with_suffix(f".{os.uname().nodename}-{os.getpid()}.part")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
