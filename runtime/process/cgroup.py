"""Folders of this process's control groups, version 1 or 2, in which the kernel keeps their limits. Torch-free."""

from __future__ import annotations

from pathlib import Path


def folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """The folders of this process's control group and of its parents, whose limits apply, too.

    Args:
        controller: "cpu", "memory" ... of version 1; "" for version 2.
        root: where /proc and /sys are, for tests.
    """
    found = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            for mount in sorted({controller, controllers}):
                found += _up(root / "sys/fs/cgroup" / mount, path)
    return found


def _up(mount: Path, path: str) -> list[Path]:
    """The folder of `path` and its parents up to `mount`. In a container without a cgroup namespace only the mount,
    which is the container's group, exists: files of the other folders read as ""."""
    folder = mount / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent == mount or mount in parent.parents)]


def read(path: Path) -> str:
    """The content of a small file in /sys or /proc; "" if it does not exist."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
