"""A folder of checkpoints: lists the complete ones, completes one by a rename, deletes old ones. (torch-free)

FOLDER/TAG/             complete
FOLDER/.TAG.partial/    being written, or left behind by a process that was killed
FOLDER/.TAG.pruned/     being deleted
FOLDER/.TAG.replaced/   the old one while it is replaced, on file systems without an atomic exchange of two names
FOLDER/latest           the tag of the newest complete checkpoint, for people and scripts
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint.format.manifest import MANIFEST, CheckpointError, read_manifest
from runtime.process.atomic_file import replace_text
from runtime.wire.filelock import try_lock
from runtime.wire.sizes import format_size

LATEST = "latest"
SPARE_BYTES = 16 << 20
"""Disk space in bytes to leave free beyond what a checkpoint needs."""
_LEFT_BEHIND = (".partial", ".pruned", ".replaced")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
AUTOMATIC_PREFIX = "step-"


@dataclass(frozen=True, order=True)
class CompleteCheckpoint:
    """A complete checkpoint; later ones compare greater."""

    number: int
    """Counts the checkpoints of a folder in order of completion."""
    step: int
    path: Path
    latest: bool = True
    """Whether a resume may start from it (save_latest)."""


def step_tag(step: int) -> str:
    """The tag of an automatic checkpoint; tags sort in the order of steps."""
    return f"{AUTOMATIC_PREFIX}{step:08d}"


def script_tag(step: int) -> str:
    """The tag of a checkpoint that a script saves without one, the same as DeepSpeed's."""
    return f"global_step{step}"


def complete_checkpoints(folder: Path) -> list[CompleteCheckpoint]:
    """The complete checkpoints of `folder` with a readable manifest, oldest first. Other files are not checked."""
    found = []
    for path in _folders(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        found.append(CompleteCheckpoint(manifest.number, manifest.step, path, manifest.latest))
    return sorted(found)


def _folders(folder: Path) -> Iterator[Path]:
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        if not path.name.startswith(".") and (path / MANIFEST).is_file():
            yield path


def newest(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` that was finished last; one saved with save_latest=False counts only if there
    is no other."""
    found = complete_checkpoints(folder)
    found = [entry for entry in found if entry.latest] or found
    return found[-1].path if found else None


def next_number(folder: Path) -> int:
    """The number of the next checkpoint to be completed in `folder`."""
    return 1 + max((found.number for found in complete_checkpoints(folder)), default=0)


def disk_space_problem(folder: Path, nbytes: int) -> str:
    """Why `nbytes` more do not fit on the disk of `folder`, which need not exist yet; empty if they do."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        disk = os.statvfs(existing)
    except OSError as error:
        return f"{existing}: {error.strerror or error}"
    free = disk.f_bavail * disk.f_frsize
    if free >= nbytes + SPARE_BYTES:
        return ""
    return f"it needs {format_size(nbytes)} and {folder} has {format_size(free)} free"


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left behind, and restore a checkpoint that was being replaced. Folders that a live
    process has locked are left alone."""
    for path in folder.glob(".*"):
        if path.suffix not in _LEFT_BEHIND or (path.suffix == ".partial" and _is_locked(path)):
            continue
        original = path.with_name(path.name[1 : -len(path.suffix)])
        if path.suffix == ".replaced" and not original.exists():
            path.rename(original)
        else:
            shutil.rmtree(path, ignore_errors=True)


def claim_partial(folder: Path, tag: str) -> Path:
    """Remove leftovers, then create and lock an empty FOLDER/.TAG.partial. The lock lasts until `release_partial` or
    the end of the process.

    Raises CheckpointError if another process is writing FOLDER/TAG.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_leftovers(folder)
    partial = partial_of(folder, tag)
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        raise CheckpointError("another process is writing it") from None
    handle = os.open(partial, os.O_RDONLY)
    _partial_locks[partial] = handle
    try_lock(handle)  # a file system without locks: leftovers look the same as live writes
    return partial


def release_partial(partial: Path) -> None:
    """Unlock a folder from `claim_partial`, once it is complete or abandoned."""
    handle = _partial_locks.pop(partial, None)
    if handle is not None:
        os.close(handle)


_partial_locks: dict[Path, int] = {}
"""Partial folder -> the file descriptor that holds its lock."""


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return try_lock(handle) is False
    finally:
        os.close(handle)


def partial_of(folder: Path, tag: str) -> Path:
    """The folder into which FOLDER/TAG is written before it is complete."""
    return folder / f".{tag}.partial"


def finish(folder: Path, tag: str, latest: bool = True) -> None:
    """Rename FOLDER/.TAG.partial, whose files are synced, to FOLDER/TAG, and with `latest` update FOLDER/latest.

    An existing FOLDER/TAG is exchanged atomically, so that one always exists. FOLDER/latest is written last, so that
    it always names a complete checkpoint.
    """
    partial, final = partial_of(folder, tag), folder / tag
    sync(partial)
    if not final.exists():
        partial.rename(final)
    elif _exchange(partial, final):
        sync(folder)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        # If killed between the two renames, remove_leftovers() restores the old one.
        aside = folder / f".{tag}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
    sync(folder)
    if latest:
        replace_text(folder / LATEST, tag + "\n")
        sync(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically (renameat2(2)). Returns False where kernel or file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def sync(path: Path) -> None:
    """Fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
