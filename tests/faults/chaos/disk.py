"""Where the checkpoints go: a small tmpfs where one may be mounted, which can be full or read-only; else a folder."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from tests.harness.waiting import until

SIZE_MIB = 320
BALLAST = "ballast"


class Disk:
    """`folder` is it. Without the right to mount, "full" is a quota that refuses all writing, by the folder's mode."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=700", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self) -> None:
        """Take all the space that is left."""
        if not self.mounted:
            self._set_mode(0o500)
            return
        with (self.folder / BALLAST).open("wb") as out, contextlib.suppress(OSError):
            while True:
                out.write(bytes(1 << 20))
                out.flush()

    def empty(self) -> None:
        if not self.mounted:
            self._set_mode(0o700)
            return
        (self.folder / BALLAST).unlink(missing_ok=True)

    def forbid(self) -> None:
        """Nothing can be written any more. A file system that is being written to refuses for a moment."""
        if not self.mounted:
            self._set_mode(0o500)
            return
        remount = ["mount", "-o", "remount,ro", str(self.folder)]
        until(lambda: subprocess.run(remount, capture_output=True).returncode == 0, f"{self.folder} read-only", 30)

    def allow(self) -> None:
        if not self.mounted:
            self._set_mode(0o700)
            return
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True, capture_output=True)

    def _set_mode(self, mode: int) -> None:
        for folder in (self.folder, *(path for path in self.folder.iterdir() if path.is_dir())):
            folder.chmod(mode)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True, capture_output=True)
