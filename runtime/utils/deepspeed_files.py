"""The files of DeepSpeed's own checkpoint layout, for converters that open them (Lightning's does): what a checkpoint
of zerotop knows beside tensors, by the keys that DeepSpeed has for it.

They are written when they are asked for, into a folder of this process that goes when it ends. The weights are
get_fp32_state_dict_from_zero_checkpoint()'s to give. In a folder that holds such files of DeepSpeed itself, those are
found.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint.content.small_files import read_common
from runtime.checkpoint.format.manifest import MANIFEST, read_manifest

OPTIMIZER_FILES, MODEL_FILES = "*_optim_states.pt", "*_model_states.pt"


def get_optim_files(checkpoint_dir: str | Path) -> list[str]:
    """CHECKPOINT_DIR: with its tag. Each file holds "optimizer_state_dict" with "zero_stage" and "partition_count"."""
    return _files(Path(checkpoint_dir), OPTIMIZER_FILES)


def get_model_state_files(checkpoint_dir: str | Path) -> list[str]:
    """CHECKPOINT_DIR: with its tag. Each file holds what the script gave as client_state, the scheduler's state and the
    step counts."""
    return _files(Path(checkpoint_dir), MODEL_FILES)


def get_model_state_file(checkpoint_dir: str | Path, zero_stage: int) -> str:
    """Rank 0's of them. zero_stage: not needed, it is in the checkpoint."""
    return get_model_state_files(checkpoint_dir)[0]


def _files(folder: Path, pattern: str) -> list[str]:
    if (folder / MANIFEST).is_file():
        folder = _written(folder.resolve())
    found = sorted(map(str, folder.glob(pattern)), key=_by_number)
    if not found:
        raise FileNotFoundError(f"{folder}: expected a checkpoint's folder, with its tag: no {pattern} in it")
    return found


@cache
def _written(checkpoint: Path) -> Path:
    manifest, common = read_manifest(checkpoint), read_common(checkpoint)
    model = {
        "lr_scheduler": common["scheduler"],
        "global_steps": manifest.step,
        "skipped_steps": manifest.step - manifest.optimizer_step - manifest.foreign_steps,
        "dp_world_size": manifest.world_size,
        "mp_world_size": 1,
        **common["client_state"],
    }
    optimizer = {"optimizer_state_dict": {"zero_stage": manifest.stage, "partition_count": manifest.world_size}}
    folder = Path(tempfile.mkdtemp(prefix="zerotop-files-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prefix = "zero_pp_rank_0_mp_rank_00" if manifest.stage == 3 else "mp_rank_00"
    torch.save(model, folder / MODEL_FILES.replace("*", prefix))
    torch.save(optimizer, folder / OPTIMIZER_FILES.replace("*", "zero_pp_rank_0_mp_rank_00"))
    return folder


def _by_number(name: str) -> list[Any]:
    """Rank 2 before rank 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
