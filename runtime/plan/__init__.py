"""Memory and traffic of a run before it starts, in closed form. Torch-free.

constants  numbers that the engine shares
layout     shard arithmetic: which elements of a flat parameter group belong to which rank; the engine uses it, too
workload   what is planned for, and the way there from a resolved config
memory     bytes of every category at every stage, on the GPU and on the host; traffic per step
inflight   what the engine holds beside the states: buffers that a backward borrows
estimate   activations, logits and the device's context, which are estimates
"""

from runtime.plan.memory import (
    CATEGORIES,
    EXACT,
    Layout,
    data_parallel,
    find,
    plan,
    stage_layout,
)

__all__ = ["CATEGORIES", "EXACT", "Layout", "data_parallel", "find", "plan", "stage_layout"]
