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

manifest (what a checkpoint says of itself) · folder (which ones there are, and the rename) · parts (tensors) · common,
rng, registered (the rest) · describe (model/) · index, legacy (where tensors are) · plain, stored (what files hold,
read without trusting it) · shards (written) · job, writing (all ranks together) · saving (by the ranks) · snapshot,
background, process, writer (beside training) · fitting, loading · calls (an engine's own) · reading (whole tensors, in
one process) · huggingface (safetensors) · target (the folder they go to) · export (the process that `zerotop export`
starts). Every collective part runs on Gloo, on groups apart from training's.

Writing and reading are imported at their first use: torch.distributed.checkpoint takes 48 MB of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.checkpoint.folder import complete, newest, prune, script_tag, step_tag
from runtime.checkpoint.manifest import EVERYTHING, CheckpointError, Damaged, Manifest, Wanted, read_manifest
from runtime.deepspeed_paths import attribute_of

if TYPE_CHECKING:
    from runtime.checkpoint.job import on_rank_0
    from runtime.checkpoint.loading import Loaded, load
    from runtime.checkpoint.saving import save

__all__ = [
    "EVERYTHING",
    "CheckpointError",
    "Damaged",
    "Loaded",
    "Manifest",
    "Wanted",
    "complete",
    "load",
    "newest",
    "on_rank_0",
    "prune",
    "read_manifest",
    "save",
    "script_tag",
    "step_tag",
]

_LATER = {"Loaded": "loading", "load": "loading", "on_rank_0": "job", "save": "saving"}


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.checkpoint", name, _LATER)
