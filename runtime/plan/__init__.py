"""Memory and communication of a run before it starts, in closed form. Torch-free.

constants  constants that the engine uses, too
layout     shard arithmetic: which elements of a flat parameter group belong to which rank; the engine uses it, too
workload   the model and settings that are planned for, made from a resolved config
memory     bytes of every category at every stage, on the GPU and on the host
traffic    bytes sent per step
inflight   buffers that the engine holds beside the states
estimate   estimates of activations, logits and the CUDA context; decoder of a Hugging Face model's blocks
loss_chunks  how cross-entropy in chunks cuts the tokens; the model uses it, too

Of a Hugging Face model: model_files (and gguf_header) finds and reads the headers of its files, pretrained makes
parameters and shape of them, lora_names adds adapters, named_units cuts all into units.
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
