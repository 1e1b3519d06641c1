"""The output folder of an export: checked first, written under a hidden name, and renamed when complete. Torch-free."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from runtime.checkpoint.format.folder import sync
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.wire.filelock import try_lock
from runtime.wire.sizes import format_size

_OF_A_MODEL = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md")
"""Files that --overwrite may delete; a folder with any other file is not an exported model."""


def check_target(out: Path, checkpoint: Path, overwrite: bool) -> Path:
    """`out` as an absolute path without symbolic links. Raises CheckpointError if it is not safe to write or
    replace."""
    out = out.expanduser().resolve()
    if out.is_relative_to(checkpoint.resolve()):
        raise CheckpointError(f"{out} is inside the checkpoint, with which it would be deleted: choose another folder")
    if not out.exists():
        return out
    if not out.is_dir():
        raise CheckpointError(f"{out} is a file: expected an empty or new folder")
    if os.path.ismount(out) or out == Path.cwd():
        what = "a mount point" if os.path.ismount(out) else "the current folder"
        raise CheckpointError(f"{out} is {what}, which can't be replaced by a rename: choose a folder inside it")
    content = sorted(path.name for path in out.iterdir())
    if content and not overwrite:
        raise CheckpointError(f"{out} is not empty: choose another folder, or replace this one with --overwrite")
    for name in content:
        if (out / name).is_dir() or not any(fnmatchcase(name, pattern) for pattern in _OF_A_MODEL):
            raise CheckpointError(f"{out} holds {name}, which is not part of an exported model: refusing to overwrite")
    return out


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise OSError if the disk of `out` has less than `needed_bytes` free."""
    existing = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space in {existing}: {format_size(needed_bytes)} needed, {format_size(free)} free",
        )


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder to write into. On success it is synced and replaces `out`; on failure it is deleted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    handle = _claim(partial)
    try:
        _restore(aside, out)  # after an export that was killed
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


def _is_still(handle: int, path: Path) -> bool:
    """Whether `path` is the folder that `handle` has open."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _claim(partial: Path) -> int:
    """Create the folder, or empty one that a killed export left. Returns the descriptor that holds its lock."""
    busy = f"{partial} is being written by another export; if none is running, remove it"
    fresh = True
    try:
        partial.mkdir()
    except FileExistsError:
        fresh = False
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    locked = try_lock(handle)
    # NFS has no folder locks: then creating it decides. Its owner may have renamed it before the lock was acquired.
    ours = fresh if locked is None else locked and _is_still(handle, partial)
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
