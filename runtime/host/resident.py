"""Resident memory of this process as the kernel counts it: how much, of which kind, and the most since a reset.
Torch-free.

Only what costs microseconds is read here. /proc/self/smaps_rollup and smaps walk all page tables: 9 ms in a rank with
220 MiB and 70 ms in one with 3 GiB, during which page faults of the training thread wait (benchmarks/memory_truth.py).
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from typing import Any, NamedTuple, Self

_STATUS, _CLEAR_REFS, _SMAPS, _MAPS = (f"/proc/self/{name}" for name in ("status", "clear_refs", "smaps", "maps"))
_RESET_PEAK = b"5"  # Documentation/filesystems/proc.rst, clear_refs
FILES_COST_SHARE = 0.0005
"""Largest share of the time that reading the mappings may take."""
FILES_FROM = 1 << 20
"""Size in bytes from which mapped data files are told apart from libraries."""


class Resident(NamedTuple):
    """Bytes of this process in memory: the first is the sum of the next three."""

    rss: int
    anonymous: int
    """Of no file: heap, stacks, private mappings, and pages of libraries that were written to."""
    file: int
    """Unchanged pages of mapped files: libraries, and data such as safetensors."""
    shared: int
    """Shared memory that this process has touched."""
    peak: int
    """Largest rss since `reset_peak`, or since the start."""


_KEYS = (b"VmRSS:", b"RssAnon:", b"RssFile:", b"RssShmem:", b"VmHWM:")


def read_resident() -> Resident | None:
    """The current figures; None where /proc has none. Takes about 15 us."""
    try:
        descriptor = os.open(_STATUS, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(descriptor, 8192)
    finally:
        os.close(descriptor)
    found: dict[bytes, int] = {}
    for line in text.splitlines():
        if line.startswith((b"Vm", b"Rss")):
            key, value, *_ = line.split()
            found[key] = int(value) * 1024
    if not all(key in found for key in _KEYS):
        return None
    _, anonymous, file, shared, peak = (found[key] for key in _KEYS)
    rss = anonymous + file + shared  # VmRSS is read a moment apart
    return Resident(rss, anonymous, file, shared, max(peak, rss))


def reset_peak() -> bool:
    """Let the peak begin again at the current size. Returns whether the kernel allows it. Takes about 2 us."""
    try:
        descriptor = os.open(_CLEAR_REFS, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, _RESET_PEAK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


# ---- tensors outside of malloc ---------------------------------------------------------------------------------------
class _Counter:
    """Bytes of tensors whose memory does not come from malloc."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nbytes = 0

    def add(self, nbytes: int) -> None:
        """Count `nbytes`, which may be negative. Any thread."""
        with self._lock:
            self.nbytes += nbytes


outside_malloc = _Counter()
"""Of this process: mappings of `CountedPages`, and shared memory."""


class CountedPages(mmap.mmap):
    """A private mapping for a tensor, counted in `outside_malloc` as long as it lives."""

    counted = 0

    @classmethod
    def make(cls, nbytes: int) -> Self:
        """Raises OSError if the system has no more address space."""
        pages = cls(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.counted = nbytes
        outside_malloc.add(nbytes)
        return pages

    def __del__(self) -> None:
        if self.counted and not sys.is_finalizing():  # then the counter may be gone
            outside_malloc.add(-self.counted)


# ---- mapped files ----------------------------------------------------------------------------------------------------
class FileMappings:
    """The part of the file pages that belongs to data and not to libraries. Reads the mappings again only as often as
    FILES_COST_SHARE allows."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._file = -1
        self._data = 0

    def data_bytes(self, file: int) -> int:
        """Resident bytes of mapped data files, at most `file`, the resident bytes of all mapped files."""
        began = time.monotonic()
        if began >= self._next_s and abs(file - self._file) >= FILES_FROM:
            self._file = file
            self._data = _resident_data() if _mapped_data() >= FILES_FROM else 0
            now = time.monotonic()
            self._next_s = now + (now - began) / FILES_COST_SHARE
        return min(self._data, file) if self._data >= FILES_FROM else 0


_OF_THE_SYSTEM = (b"/usr/", b"/lib", b"/memfd:", b"/dev/", b"/SYSV")


def _is_data(path: bytes) -> bool:
    name = path.rsplit(b"/", 1)[-1]
    library = name.endswith(b".so") or b".so." in name or b"/bin/" in path
    return path.startswith(b"/") and not library and not path.startswith(_OF_THE_SYSTEM)


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _mapped_data() -> int:
    """Size of all mapped data files, resident or not."""
    total = 0
    for line in _lines(_MAPS):
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _is_data(fields[5]):
            start, end = fields[0].split(b"-")
            total += int(end, 16) - int(start, 16)
    return total


def _resident_data() -> int:
    """Resident bytes of mapped data files."""
    total, data = 0, False
    for line in _lines(_SMAPS):
        fields: Any = line.split(maxsplit=5)
        if b"-" in fields[0] and not fields[0].endswith(b":"):
            data = len(fields) == 6 and _is_data(fields[5])
        elif data and fields[0] in (b"Rss:", b"Anonymous:"):
            total += int(fields[1]) * 1024 * (1 if fields[0] == b"Rss:" else -1)
    return total
