"""The folder that an export makes: checked first, written under a hidden name, complete as soon as it has its own.
Torch-free."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from runtime.checkpoint.format.folder import sync
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.wire.sizes import format_size

_OF_A_MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
"""What --overwrite may throw away; a folder that holds anything else is not an exported model's."""


def check_target(out: Path, checkpoint: Path, overwrite: bool) -> Path:
    """`out` as an absolute path without links. Raises CheckpointError where it can't be written or would cost somebody
    their files."""
    out = out.expanduser().resolve()
    if out.is_relative_to(checkpoint.resolve()):
        raise CheckpointError(f"{out} is inside the checkpoint, and would go with it: choose another folder")
    if not out.exists():
        return out
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file: expected a folder, empty or not there yet")
    if os.path.ismount(out) or out == Path.cwd():
        what = "a mount point" if os.path.ismount(out) else "the current folder"
        raise CheckpointError(f"{out} is {what}, which can't be replaced when all is written: name a folder inside it")
    content = sorted(path.name for path in out.iterdir())
    if content and not overwrite:
        raise CheckpointError(f"{out} is not empty: choose another folder, or replace this one with --overwrite")
    for name in content:
        if (out / name).is_dir() or not any(fnmatchcase(name, pattern) for pattern in _OF_A_MODEL):
            raise CheckpointError(f"{out} holds {name}, which is no part of an exported model: it is not overwritten")
    return out


def check_space(out: Path, needed_bytes: int) -> None:
    """Raises OSError when the disk under `out` has less room."""
    there = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space in {there}: {format_size(needed_bytes)} are needed, {format_size(free)} are free",
        )


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """An empty folder to write into. When the block ends well it takes `out`'s place, on disk for certain; else nothing
    of it remains."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    handle = _claim(partial)
    try:
        _restore(aside, out)  # of an export that was killed
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if out.exists() and any(out.iterdir()):
            shutil.rmtree(aside, ignore_errors=True)
            out.rename(aside)
        partial.rename(out)
        sync(out.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        _restore(aside, out)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _claim(partial: Path) -> int:
    """Make the folder, or take over what a killed export left of it; returns the descriptor that keeps others away."""
    busy = f"{partial} is being written by another export; if none is running, remove it"
    fresh = True
    try:
        partial.mkdir()
    except FileExistsError:
        fresh = False
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have finished, and renamed it, before we got the lock.
        ours = os.path.samestat(os.fstat(handle), os.stat(partial))
    except OSError as error:
        ours = fresh and not isinstance(error, BlockingIOError)  # NFS does not lock folders: then making it decides
    if not ours:
        os.close(handle)
        raise CheckpointError(busy)
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return handle


def _restore(aside: Path, out: Path) -> None:
    if aside.exists() and not out.exists():
        aside.rename(out)
