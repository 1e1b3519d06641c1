"""Constants that the engine and the plan of its memory share. Torch-free."""

REDUCTIONS_IN_FLIGHT = 1
"""Gradient reductions under way at once, beside the unit whose gradients are arriving. A second one would take another
full unit's buffer and overlap nothing more."""
OFFLOAD_SLOTS = 2
"""Pinned buffers per direction through which copies between GPU and host pass."""
STREAM_SLOTS = 3
"""Chunks of offloaded states on the GPU at a time: one is loaded, one updated, one stored."""
SNAPSHOT_SLOT_BYTES = 32 << 20
SNAPSHOT_SLOTS = 2
"""Buffers through which a checkpoint reads offloaded states, in chunks of SNAPSHOT_SLOT_BYTES."""
STACK_SHARE = 0.1
"""A second list of blocks (an encoder beside a decoder) is cut into units, too, if it has at least this share of the
largest list's parameters."""
