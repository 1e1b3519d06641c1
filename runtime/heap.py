"""Which of a rank's host memory goes back to the system when it is freed. Torch-free.

glibc maps large blocks by themselves, and gives them back when they are freed. But the first one that is freed raises
the size from which it does so, up to 32 MiB. What is smaller then lives in its heap, which keeps the holes: on a CPU
stage 3, which allocates and frees a unit's parameters all the time, took more than stage 2
(benchmarks/results/heap.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

MAPPED_FROM = 4 << 20
"""Bytes. Smaller blocks are activations, mostly: mapping those would cost more in page faults than their holes take."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def map_large_blocks() -> bool:
    """From now on blocks from MAPPED_FROM bytes on are mapped by themselves in this process. Returns whether they are:
    what the user has set in the environment stays, and other C libraries than glibc have no such setting."""
    tuned = any(name in os.environ for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tuned or mallopt is None:
        return False
    # The heap's free end is kept up to twice as much, as glibc does itself when it raises the threshold.
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)) and bool(mallopt(_M_TRIM_THRESHOLD, 2 * MAPPED_FROM))
