"""What converters written for DeepSpeed's checkpoint files find in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.test_checkpoint import advance, engine_for
from tests.numerics.test_parity import config


def save(stage: int, folder: str) -> None:
    engine = engine_for(config(stage, 1, clip=0.0))
    advance(engine, 0, 2)
    engine.save_checkpoint(folder, tag="checkpoint", client_state={"epoch": 3, "seen": torch.ones(2)})


def convert_as_lightning(folder: Path) -> dict[str, Any]:
    """lightning.pytorch.utilities.deepspeed: the script's own states with the weights."""
    from runtime.utils.zero_to_fp32 import (
        get_fp32_state_dict_from_zero_checkpoint,
        get_model_state_file,
        get_optim_files,
    )

    weights = get_fp32_state_dict_from_zero_checkpoint(folder)
    inside = folder / (folder / "latest").read_text().strip()
    stage = torch.load(get_optim_files(inside)[0])["optimizer_state_dict"]["zero_stage"]
    states = torch.load(get_model_state_file(inside, stage))
    ours = ("module", "optimizer", "lr_scheduler", "skipped_steps", "global_steps", "dp_world_size", "mp_world_size")
    return {**{key: value for key, value in states.items() if key not in ours}, "stage": stage, "state_dict": weights}


@pytest.mark.parametrize("stage", [2, 3])
def test_lightnings_converter_finds_what_it_opens(ranks, stage, tmp_path):
    from runtime.utils.zero_to_fp32 import get_model_state_files

    ranks(2).run(save, stage, str(tmp_path))
    found = convert_as_lightning(tmp_path)
    assert found.keys() == {"epoch", "seen", "stage", "state_dict"}
    assert (found["epoch"], found["stage"], found["seen"].tolist()) == (3, stage, [1.0, 1.0])
    assert "head.weight" in found["state_dict"]
    [file] = get_model_state_files(tmp_path / "checkpoint")
    states = torch.load(file)
    assert (states["global_steps"], states["dp_world_size"], states["skipped_steps"]) == (2, 2, 0)
    assert not list((tmp_path / "checkpoint").glob("*_states.pt"))  # the checkpoint stays what was written


def test_files_of_deepspeed_itself_come_in_the_order_of_ranks(tmp_path):
    from runtime.utils.zero_to_fp32 import get_optim_files

    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [Path(file).name for file in get_optim_files(tmp_path)] == names
    with pytest.raises(FileNotFoundError, match="with its tag"):
        get_optim_files(tmp_path.parent / "nothing")
