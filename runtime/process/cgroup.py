"""Where the kernel writes down the limits of this process's control groups, version 1 or 2. Torch-free."""

from __future__ import annotations

from pathlib import Path


def folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """The group of this process and those above it, whose limits hold as well.

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
    """A container without a cgroup namespace sees a path that its mount, which shows the container's own group at the
    top, doesn't have. Of such a path only the top is there, and what isn't there reads as ""."""
    folder = mount / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent == mount or mount in parent.parents)]


def read(path: Path) -> str:
    """What a small file of /sys or /proc says; "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
