"""Whether torch's allocator on a GPU runs short because its free memory is in pieces."""

from __future__ import annotations

from runtime.wire.messages import Memory
from zerotop.format import bytes_text, share_text

CACHED_SHARE = 0.1
"""Share of the reserved memory that must be in no tensor: below it the GPU is simply full."""
SPLIT_SHARE = 0.05
"""Share of the reserved memory in free pieces of blocks that are in use elsewhere."""
ADVICE = (
    "Set PYTORCH_ALLOC_CONF=expandable_segments:True in the environment of the next start, or lower "
    "train_micro_batch_size_per_gpu."
)


def fragmentation_text(rank: int, memory: Memory, retries_before: int) -> str:
    """One sentence with figures and what to do; empty if there is no alarm.

    The sign is a retry: an allocation failed, and the allocator had to return its cache to the driver and try again,
    though a large part of what it held was free. retries_before: their number at an earlier look.
    """
    retries, reserved, allocated = memory.alloc_retries, memory.reserved_bytes, memory.allocated_bytes
    if retries is None or not reserved or allocated is None or retries <= retries_before:
        return ""
    free, split = reserved - allocated, memory.inactive_split_bytes or 0
    if free < CACHED_SHARE * reserved and split < SPLIT_SHARE * reserved:
        return ""
    more, share = retries - retries_before, share_text(free, reserved)
    return (
        f"rank {rank}: the GPU's memory is fragmented: torch's allocator freed its cache and tried again {more} "
        f"time{'s' * (more > 1)}, though {bytes_text(free)} ({share}) of the {bytes_text(reserved)} that it reserves "
        f"are in no tensor, {bytes_text(split)} of these in pieces of blocks in use. {ADVICE}"
    )
