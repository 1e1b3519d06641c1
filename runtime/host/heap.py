"""Which of a rank's host memory goes back to the system when it is freed. Torch-free.

glibc maps large blocks by themselves, and gives them back when they are freed. But the first one that is freed raises
the size from which it does so, up to 32 MiB. What is smaller then lives in its heap, which keeps the holes: on a CPU
stage 3, which allocates and frees a unit's parameters all the time, took more than stage 2. Activations would be mapped
as often and fill most of their memory anew, in page faults that cost more than their holes
(benchmarks/results/heap.md). So only what is allocated inside `mapped()` is mapped.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAPPED_FROM = 1 << 20
"""Bytes, inside `mapped()`."""
KEPT_BELOW = 32 << 20
"""Bytes, elsewhere: where glibc's own rule ends, too, after blocks of all sizes were freed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@contextmanager
def mapped() -> Iterator[None]:
    """Large blocks that are allocated inside are mapped by themselves. What the user has set in the environment stays,
    and other C libraries than glibc have no such setting."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BELOW)


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    tuned = any(name in os.environ for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tuned or mallopt is None:
        return None
    mallopt(_M_TRIM_THRESHOLD, 2 * KEPT_BELOW)  # of the heap's free end, as glibc sets it beside the other
    return mallopt  # type: ignore[no-any-return]
