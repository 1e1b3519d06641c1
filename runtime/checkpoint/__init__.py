"""Checkpoints: sharded, atomic, keyed by parameter name, readable at any world size, stage and unit cut.

    FOLDER/TAG/                 complete as soon as it has this name: written as FOLDER/.TAG.partial and renamed
      __N_*.distcp              fp32 masters and optimizer states as 1-D slices of each parameter, in the file format of
                                torch.distributed.checkpoint
      tensors.json              file, offset and dtype of every slice
      .metadata                 the same for torch.distributed.checkpoint's tools; a pickle, which zerotop does not read
      common.pt                 scheduler, optimizer scalars, client_state, registered objects (rank 0's)
      rng-N.pt                  random number generator states of rank N
      model/                    config.json and tokenizer, which an export needs in addition to the weights
      manifest.json             step, world size, parameter shapes, ...; sizes and SHA-256 of all other files
    FOLDER/latest               TAG of the newest complete checkpoint

format/            reads and writes these files; readers validate everything, as a checkpoint may come from anybody
content/           what stands in them, taken from a training state and put back into one
saving/            writes them, by the ranks themselves or beside training by writer processes
checkpointer       saves and loads for one engine
load               reads a checkpoint into a training state; compatibility: the checks before that
tag_validation     one folder and tag on all ranks, for checkpoints that a script saves
optimizer_states   optimizer.state_dict(), which covers this rank's shards only

The ranks' collectives run on Gloo groups of their own; their writer processes exchange values over sockets, and what
these processes import is torch-free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.checkpoint.format.folder import complete_checkpoints, newest, script_tag, step_tag
from runtime.checkpoint.format.manifest import (
    LOAD_EVERYTHING,
    CheckpointError,
    DamagedCheckpoint,
    LoadOptions,
    Manifest,
    read_manifest,
)
from runtime.checkpoint.format.retention import prune
from runtime.deepspeed_paths import attribute_of

if TYPE_CHECKING:
    from runtime.checkpoint.saving.job import on_rank_0

__all__ = [
    "LOAD_EVERYTHING",
    "CheckpointError",
    "DamagedCheckpoint",
    "LoadOptions",
    "Manifest",
    "complete_checkpoints",
    "newest",
    "on_rank_0",
    "prune",
    "read_manifest",
    "script_tag",
    "step_tag",
]

_LATER = {"on_rank_0": "saving.job"}


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.checkpoint", name, _LATER)
