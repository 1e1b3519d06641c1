"""Where files are: runs in the XDG state home, the user's settings in the XDG config home, sockets in short private
folders in /tmp."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from platformdirs.unix import Unix

from runtime.wire.filelock import try_lock

LOCK_NAME = "lock"
_XDG = Unix("zerotop", appauthor=False)
"""On macOS too: a folder is where the XDG variables and ~/.config say, as for other tools of the terminal."""
SOCKET_PATH_LIMIT = 107
"""The longest path of a Unix socket, in characters."""


class RunError(Exception):
    """Something about a run that the user can fix: one clear message, exit code 2."""


def error_text(error: OSError) -> str:
    """Which file, and what is wrong with it."""
    said = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {said}" if error.filename and not isinstance(error.filename, int) else said


def state_home() -> Path:
    """$XDG_STATE_HOME/zerotop, by default ~/.local/state/zerotop. Raises RunError for a user without a home."""
    path = _XDG.user_state_path
    if not path.is_absolute():  # no HOME, and a user id without a name
        raise RunError("there is no home directory: set HOME, or XDG_STATE_HOME to where runs are to be kept")
    return path


def config_home() -> Path:
    """$XDG_CONFIG_HOME/zerotop, by default ~/.config/zerotop: the user's keys and themes."""
    return _XDG.user_config_path


def picture_folders() -> tuple[Path, ...]:
    """The user's folders for pictures and for downloads; they need not exist."""
    return _XDG.user_pictures_path, Path.home() / "Pictures", _XDG.user_downloads_path


def working_folder() -> str:
    """The working directory. Raises RunError if it was removed."""
    try:
        return os.getcwd()
    except OSError as error:
        raise RunError(f"the working directory is gone ({error.strerror}): change to another one") from None


def check_utf8(what: str, name: str) -> None:
    """Raises RunError for a name that is not valid UTF-8, which run.json could not hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise RunError(f"{what}: expected a name in UTF-8, got {shown}: rename it, or make a link to it") from None


def runs_home() -> Path:
    """The folder with one directory per run; it need not exist."""
    return state_home() / "runs"


def make_private_folder(folder: Path) -> Path:
    """Create `folder` and its parents with mode 0700, or check that an existing one belongs to this user. Raises
    RunError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RunError(f"can't create {folder}: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise RunError(f"{folder} is not a plain directory: remove it; zerotop keeps private files there")
    if found.st_uid != os.getuid():
        raise RunError(
            f"{folder} belongs to user id {found.st_uid}, not to you ({os.getuid()}): "
            "it can't be trusted with private files"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


def sockets_home() -> Path:
    """/tmp/zerotop-UID. Not in the home directory (often NFS, and too long for a Unix socket) and not
    XDG_RUNTIME_DIR (removed at logout)."""
    return Path("/tmp") / f"zerotop-{os.getuid()}"


def _free_sockets_home() -> Path:
    """The usual folder or, if another user has taken its name (which anybody can in /tmp), a new one."""
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
    """A new folder (0700) for one attempt's sockets. Folders of runs that have ended are removed first."""
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
    """Lock the folder for the life of this process and return the descriptor. Raises RunError if another process has
    the lock.

    ZeroMQ removes an existing socket file when it binds, so a second hub would silently take over the first one's
    address.
    """
    make_private_folder(folder)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if try_lock(descriptor) is False:
        os.close(descriptor)
        raise RunError(f"{folder} is in use by another supervisor")
    return descriptor


def remove_sockets(folder: Path) -> None:
    """Remove a sockets folder if it is one of ours and not a link, and its parent if that was created for it."""
    home, usual = folder.parent, sockets_home()
    own = home.parent == usual.parent and home.name.startswith(f"{usual.name}-")
    if (home != usual and not own) or folder.is_symlink() or not _is_ours(home):
        return
    shutil.rmtree(folder, ignore_errors=True)
    if own:
        with contextlib.suppress(OSError):  # another run's sockets are in it
            home.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether it is a directory of this user, and not a link."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _sweep(home: Path) -> None:
    """Remove folders whose supervisor is gone, so that nobody holds the lock. A folder without a lock file may be
    about to start."""
    for folder in home.iterdir():
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        if try_lock(descriptor):
            remove_sockets(folder)
        os.close(descriptor)
