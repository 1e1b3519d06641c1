"""A folder of checkpoints: which are complete, which is the newest, what stays, and the rename that completes one.
(torch-free)

    FOLDER/TAG/             complete
    FOLDER/.TAG.partial/    being written, or left behind by a process that was killed
    FOLDER/.TAG.pruned/     being deleted
    FOLDER/.TAG.replaced/   where a file system can't exchange two names: the old one, until the new one has its name
    FOLDER/latest           the tag of the newest complete checkpoint, for people and scripts
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoint.format.manifest import MANIFEST, CheckpointError, read_manifest
from runtime.process.atomic_file import replace_text
from runtime.wire.sizes import format_size

LATEST = "latest"
SPARE_BYTES = 16 << 20
"""Left free on the disk, beyond what a checkpoint needs."""
_LEFT_BEHIND = (".partial", ".pruned", ".replaced")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_AUTOMATIC = "step-"


@dataclass(frozen=True, order=True)
class Complete:
    """A complete checkpoint; later ones are greater."""

    number: int
    step: int
    path: Path
    latest: bool = True
    """A resume may begin from it."""


def step_tag(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"{_AUTOMATIC}{step:08d}"


def script_tag(step: int) -> str:
    """The name of a checkpoint that a script saves without giving one, which is DeepSpeed's: its users look for it."""
    return f"global_step{step}"


def complete(folder: Path) -> list[Complete]:
    """Complete checkpoints with a readable manifest, the oldest first. Their files are not looked into."""
    found = []
    for path in _folders(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        found.append(Complete(manifest.number, manifest.step, path, manifest.latest))
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
    """The checkpoint in `folder` that was completed last; one being written, or without a readable manifest, does not
    count. One that a script keeps aside (save_latest=False) does only where there is no other."""
    found = complete(folder)
    found = [entry for entry in found if entry.latest] or found
    return found[-1].path if found else None


def next_number(folder: Path) -> int:
    return 1 + max((found.number for found in complete(folder)), default=0)


def missing_space(folder: Path, nbytes: int) -> str:
    """Why `nbytes` more don't fit where `folder` is (or will be), in words; empty when they do."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        disk = os.statvfs(there)
    except OSError as error:
        return f"{there}: {error.strerror or error}"
    free = disk.f_bavail * disk.f_frsize
    if free >= nbytes + SPARE_BYTES:
        return ""
    return f"it needs {format_size(nbytes)} and {folder} has {format_size(free)} free"


def sweep(folder: Path) -> None:
    """What killed processes left behind goes, and a checkpoint that was being replaced comes back. What a living
    process writes stays: it holds a lock."""
    for path in folder.glob(".*"):
        if path.suffix not in _LEFT_BEHIND or (path.suffix == ".partial" and _is_locked(path)):
            continue
        original = path.with_name(path.name[1 : -len(path.suffix)])
        if path.suffix == ".replaced" and not original.exists():
            path.rename(original)
        else:
            shutil.rmtree(path, ignore_errors=True)


def make_room(folder: Path, tag: str) -> Path:
    """An empty FOLDER/.TAG.partial to write into, the folder swept. It is this process's until `leave_room`, or until
    the process ends.

    Raises CheckpointError where another process writes a checkpoint of that name there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep(folder)
    partial = partial_of(folder, tag)
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        raise CheckpointError("another process is writing it") from None
    handle = os.open(partial, os.O_RDONLY)
    _rooms[partial] = handle
    with contextlib.suppress(OSError):  # a file system without locks: then nobody can tell
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return partial


def leave_room(partial: Path) -> None:
    """What `make_room` gave is complete, or given up."""
    handle = _rooms.pop(partial, None)
    if handle is not None:
        os.close(handle)


_rooms: dict[Path, int] = {}
"""Descriptors that hold the locks."""


def _is_locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def partial_of(folder: Path, tag: str) -> Path:
    return folder / f".{tag}.partial"


def finish(folder: Path, tag: str, latest: bool = True) -> None:
    """FOLDER/.TAG.partial, whose files are on disk, becomes FOLDER/TAG, and `latest` says so if it is wanted.

    One with that name already is exchanged in one step: at no time is there none. `latest` is written afterwards: what
    it names is complete at all times.
    """
    partial, final = partial_of(folder, tag), folder / tag
    sync(partial)
    if not final.exists():
        partial.rename(final)
    elif _exchange(partial, final):
        sync(folder)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        # Killed between the two renames, make_room() brings the old one back.
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
    """Swap two names in one step (renameat2(2)). False where the file system or the system can't."""
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


def prune(folder: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete a run's step checkpoints but the `keep` newest and every `keep_every`-th one; returns what went."""
    steps = [found for found in complete(folder) if found.path.name.startswith(_AUTOMATIC)]
    gone = [
        found.path
        for found in steps[: max(0, len(steps) - keep)]
        if not (keep_every and found.number and found.number % keep_every == 0)
    ]
    for path in gone:
        doomed = path.with_name(f".{path.name}.pruned")
        path.rename(doomed)  # from now on no reader takes it for complete
        shutil.rmtree(doomed)
    return gone


def sync(path: Path) -> None:
    """To the disk: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
