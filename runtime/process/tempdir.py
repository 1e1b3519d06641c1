"""Folders for sockets: the path of a Unix socket has at most 107 characters, and TMPDIR may be long. Torch-free."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from pathlib import Path

_SOCKET_PATH_LIMIT = 107
_NAME = "/pymp-12345678/listener-12345678"


def keep_socket_paths_short(folder: Path) -> None:
    """If TMPDIR is too long for the path of a Unix socket, make multiprocessing use `folder` (private, short) in this
    process and its children. Otherwise the queue of a DataLoader's worker fails in a thread of its own, and training
    waits for its batches for ever."""
    if len(tempfile.gettempdir() + _NAME) <= _SOCKET_PATH_LIMIT:
        return
    # multiprocessing.util.get_temp_dir() keeps its folder here, and children inherit it.
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir=folder)


def make_sockets_folder(prefix: str, name: str) -> Path:
    """A new private folder in which the path of a socket `name` is short enough: in TMPDIR, else in /tmp."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(folder / name)) <= _SOCKET_PATH_LIMIT:
        return folder
    shutil.rmtree(folder)
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
