"""Checkpoints: sharded, atomic, keyed by parameter name, readable at any world size, stage and unit cut.

    FOLDER/TAG/                 complete as soon as it has this name: written as FOLDER/.TAG.partial and renamed
      .metadata, __N_*.distcp   torch.distributed.checkpoint: fp32 masters and optimizer states as 1-D slices of each
                                parameter
      common.pt                 scheduler, optimizer scalars, client_state, registered objects (rank 0's)
      rng-N.pt                  random number states of rank N
      model/                    config.json, the tokenizer: as far as they are known
      manifest.json             step, world size, parameter shapes, ...

manifest (what a checkpoint says of itself, and which ones there are) · shards (tensors and torch's planners) · rng ·
describe (the files of model/) · saving · loading. Every collective part runs on Gloo, on a group apart from training's.
reading (whole tensors, in one process) · huggingface (safetensors) · target (the folder they go to) · export (the
process that `zerotop export` starts).

Writing and reading are imported at their first use: torch.distributed.checkpoint takes 48 MB of memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime.checkpoint.manifest import (
    EVERYTHING,
    CheckpointError,
    Manifest,
    Wanted,
    newest,
    prune,
    read_manifest,
    step_tag,
)

if TYPE_CHECKING:
    from runtime.checkpoint.loading import Loaded, load
    from runtime.checkpoint.saving import on_rank_0, save

__all__ = [
    "EVERYTHING",
    "CheckpointError",
    "Loaded",
    "Manifest",
    "Wanted",
    "load",
    "newest",
    "on_rank_0",
    "prune",
    "read_manifest",
    "save",
    "step_tag",
]

_LATER = {"Loaded": "loading", "load": "loading", "on_rank_0": "saving", "save": "saving"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"runtime.checkpoint.{_LATER[name]}"), name)
    raise AttributeError(f"module 'runtime.checkpoint' has no attribute {name!r}")
