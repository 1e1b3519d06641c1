"""Numbers that the engine and the plan of its memory share. Torch-free."""

REDUCTIONS_IN_FLIGHT = 1
"""Gradient reductions under way at once, beside the unit whose gradients are arriving. One more would hold one more
whole unit's buffer and overlap nothing more."""
OFFLOAD_SLOTS = 2
"""Buffers in each direction that copies between GPU and host pass through."""
STREAM_SLOTS = 3
"""Pieces of offloaded states on the GPU at a time: one is being loaded, one updated, one stored."""
SNAPSHOT_SLOT_BYTES = 32 << 20
SNAPSHOT_SLOTS = 2
"""Buffers through which a checkpoint reads states that are not copied as a whole."""
