"""Where things lie: the XDG state home for runs, and short private folders in /tmp for their sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

LOCK_NAME = "lock"
SOCKET_PATH_LIMIT = 107
"""Characters that sockaddr_un holds, less its closing zero."""


class RunError(Exception):
    """Something about a run that the user can mend: one clear message, exit code 2."""


def error_text(error: OSError) -> str:
    """Which file, and what is the matter with it."""
    said = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {said}" if error.filename and not isinstance(error.filename, int) else said


def state_home() -> Path:
    """$XDG_STATE_HOME/zerotop, by default ~/.local/state/zerotop. A relative XDG_STATE_HOME counts as unset, as its
    standard demands."""
    given = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "zerotop"
    try:
        return Path.home() / ".local" / "state" / "zerotop"
    except RuntimeError:  # no HOME, and a user id without a name
        raise RunError("there is no home directory: set HOME, or XDG_STATE_HOME to where runs are to be kept") from None


def working_folder() -> str:
    """Raises RunError where it is gone."""
    try:
        return os.getcwd()
    except OSError as error:
        raise RunError(f"the working directory is gone ({error.strerror}): change to another one") from None


def check_utf8(what: str, name: str) -> None:
    """Raises RunError for a name that has bytes of another encoding: run.json could not hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise RunError(f"{what}: expected a name in UTF-8, got {shown}: rename it, or make a link to it") from None


def runs_home() -> Path:
    """The folder that holds one directory per run; it need not exist yet."""
    return state_home() / "runs"


def make_private_folder(folder: Path) -> Path:
    """Create `folder` (and its parents) as 0700, or check that an existing one is ours; raises RunError otherwise."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RunError(f"can't create {folder}: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise RunError(f"{folder} is not a plain directory: remove it, it stands where zerotop keeps private files")
    if found.st_uid != os.getuid():
        raise RunError(
            f"{folder} belongs to user id {found.st_uid}, not to you ({os.getuid()}): "
            "it can't be trusted with private files"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def sockets_home() -> Path:
    """/tmp/zerotop-UID. Not in the home (often NFS, and too long for a Unix socket) and not XDG_RUNTIME_DIR (it goes at
    logout)."""
    return Path("/tmp") / f"zerotop-{os.getuid()}"


def _free_sockets_home() -> Path:
    """The usual one; where another user has taken its name (anybody may, in /tmp), a new one with a name of its own."""
    usual = sockets_home()
    try:
        return make_private_folder(usual)
    except RunError as error:
        if not os.path.lexists(usual):
            raise RunError(f"no place for the run's sockets: {error}") from None
    try:
        return Path(tempfile.mkdtemp(prefix=f"{usual.name}-", dir=usual.parent))
    except OSError as error:
        raise RunError(f"can't create a folder for the run's sockets in {usual.parent}: {error.strerror}") from None


def make_sockets_folder() -> Path:
    """A new folder for one attempt's sockets: 8 characters, 0700, in a home that is ours; folders of dead runs are
    swept first."""
    usual = sockets_home()
    for home in usual.parent.glob(f"{usual.name}*"):
        if _is_ours(home):
            _sweep(home)
    home = _free_sockets_home()
    while True:
        folder = home / secrets.token_hex(4)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        assert len(str(folder / "telemetry")) <= SOCKET_PATH_LIMIT
        return folder


def lock_sockets(folder: Path) -> int:
    """Take the folder's lock for this process's life and return its descriptor; raises RunError if another process has
    it.

    ZeroMQ removes an existing socket file when it binds, so a second hub would silently steal the first one's address.
    """
    make_private_folder(folder)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(f"{folder} is in use by another supervisor") from None
    return descriptor


def remove_sockets(folder: Path) -> None:
    """Remove a sockets folder, if it is one of ours and not a link; and its home, where that was made for it."""
    home, usual = folder.parent, sockets_home()
    own = home.parent == usual.parent and home.name.startswith(f"{usual.name}-")
    if (home != usual and not own) or folder.is_symlink() or not _is_ours(home):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if own:
        with contextlib.suppress(OSError):  # another run's sockets are in it
            home.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether it is a directory of this user's, and no link to one."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _sweep(home: Path) -> None:
    """Remove folders whose supervisor is gone: nobody holds the lock. A folder without a lock file may be starting at
    this moment."""
    for folder in home.iterdir():
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_sockets(folder)
        except OSError:
            continue
        finally:
            os.close(descriptor)
