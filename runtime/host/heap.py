"""Makes malloc return the memory of freed units to the system. Torch-free.

glibc allocates large blocks with mmap, and unmaps them when they are freed. But the first one that is freed raises the
size from which it does so, up to 32 MiB. Smaller blocks then come from its heap, where freed ones leave holes: on a CPU
stage 3, which allocates and frees a unit's parameters all the time, took more memory than stage 2. Mapping activations,
too, would cost more in page faults than their holes do (benchmarks/results/heap.md). So only blocks that are allocated
inside `mapped()` are mapped.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

MAPPED_FROM = 1 << 20
"""Size in bytes from which blocks are mapped inside `mapped()`."""
KEPT_BELOW = 32 << 20
"""Size in bytes from which blocks are mapped elsewhere: the largest that glibc itself adapts to."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@contextmanager
def mapped() -> Iterator[None]:
    """Inside, large blocks are allocated with mmap. Does nothing if the user has tuned malloc in the environment, or
    with another C library than glibc."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BELOW)


def trim() -> None:
    """Return what malloc's heap holds free to the system, with holes between blocks that are in use. Takes
    milliseconds, so it is for the start, which frees much that later steps do not need again."""
    if (release := getattr(_libc(), "malloc_trim", None)) is not None:
        release(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    tuned = any(name in os.environ for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(_libc(), "mallopt", None)
    if tuned or mallopt is None:
        return None
    mallopt(_M_TRIM_THRESHOLD, 2 * KEPT_BELOW)  # the same ratio as glibc's
    return mallopt  # type: ignore[no-any-return]


class HeapUse(NamedTuple):
    """What malloc has from the system, in bytes."""

    in_use: int
    """In allocated blocks, those with mappings of their own included."""
    free: int
    """In freed blocks that it keeps, not all of them in memory: `trim` returns pages and keeps their addresses."""


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_use() -> HeapUse | None:
    """The current figures of glibc (2.33 or later), else None. Takes 1 us, and 10 us in a heap of many holes."""
    mallinfo = _mallinfo()
    if mallinfo is None:
        return None
    found = mallinfo()
    return HeapUse(found.uordblks + found.hblkhd, found.fordblks)


@functools.cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    mallinfo = getattr(_libc(), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _MallInfo
    return mallinfo  # type: ignore[no-any-return]
