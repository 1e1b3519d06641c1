"""Checkpoints: sharded, atomic, keyed by parameter name, readable at any world size, stage and unit cut.

    FOLDER/TAG/                 complete as soon as it has this name: written as FOLDER/.TAG.partial and renamed
      __N_*.distcp              fp32 masters and optimizer states as 1-D slices of each parameter, in the file format of
                                torch.distributed.checkpoint
      tensors.json              where each of them is
      .metadata                 the same for torch.distributed.checkpoint's tools; a pickle, which zerotop does not read
      common.pt                 scheduler, optimizer scalars, client_state, registered objects (rank 0's)
      rng-N.pt                  random number states of rank N
      model/                    config.json, tokenizer: what an export needs beside the weights
      manifest.json             step, world size, parameter shapes, ...; sizes and SHA-256 of all other files
    FOLDER/latest               the newest one's TAG

format/        these files, each read without trusting it
capture        which tensors of the training state are written, in which pieces; buffers: whose buffers those are
common         what is saved beside tensors; groups: parameter groups and schedules; describe: the files of model/;
               registered: what scripts register
checkpointer   saving and loading for one engine; snapshot: the copy that is written while training goes on
writer         the process that writes it; writer_process: that process as its rank sees it; job: what it is told
commit         writing together, and the rename
load           reading into a training state; fit: whether it fits
optimizer_states   optimizer.state_dict(), which is no checkpoint

Every collective part runs on Gloo, on groups apart from training's.

Writing and reading are imported at their first use: torch.distributed.checkpoint takes 48 MB of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.checkpoint.format.folder import complete, newest, prune, script_tag, step_tag
from runtime.checkpoint.format.manifest import EVERYTHING, CheckpointError, Damaged, Manifest, Wanted, read_manifest
from runtime.deepspeed_paths import attribute_of

if TYPE_CHECKING:
    from runtime.checkpoint.job import on_rank_0

__all__ = [
    "EVERYTHING",
    "CheckpointError",
    "Damaged",
    "Manifest",
    "Wanted",
    "complete",
    "newest",
    "on_rank_0",
    "prune",
    "read_manifest",
    "script_tag",
    "step_tag",
]

_LATER = {"on_rank_0": "job"}


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.checkpoint", name, _LATER)
