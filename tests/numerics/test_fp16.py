"""fp16 through the engine, on CPUs, where it is slow but the same: overflows skip steps and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.config import Fp16Config, Resolved, load
from runtime.engine.initialize import initialize
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch, train_plainly

PLANTED = (2, 3, 6)
"""Steps at which rank 1's gradient overflows."""
SCALING = {"initial_scale_power": 10, "loss_scale_window": 3, "hysteresis": 1}


def fp16(stage: int, accumulation: int = 2) -> Resolved:
    resolved = load(config(stage, accumulation, clip=0.5)).resolve(dist.get_world_size(), "cpu", script=True)
    return resolved.model_copy(update={"precision": "fp16", "fp16": Fp16Config(**SCALING)})  # type: ignore[arg-type]


def train(stage: int, folder: str | None = None) -> list[dict[str, Any]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=make("plain"), config=fp16(stage))[0]
    seen = []
    for step in range(8):
        before = [flat.masters.clone() for flat in engine.state.flats]
        for micro in range(2):
            loss = engine(*micro_batch(step, micro, rank, world))
            planted = step in PLANTED and rank == 1 and micro == 0
            engine.backward(loss * 1e6 if planted else loss)
            engine.step()
        changed = any(not torch.equal(old, flat.masters) for old, flat in zip(before, engine.state.flats, strict=True))
        seen.append({"scale": engine.loss_scale, "changed": changed, "skipped": engine.skipped_steps})
        seen[-1]["loss"] = loss.item()
    if folder is not None:
        engine.save_checkpoint(folder, "fp16")
        other = initialize(model=make("plain"), config=fp16(stage))[0]
        other.load_checkpoint(folder, "fp16")
        assert other.state.scaler.state_dict() == engine.state.scaler.state_dict()
        assert (other.optimizer_steps, other.skipped_steps) == (5, 3)
    assert engine.optimizer.needs_scaler()
    return seen


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflows_skip_the_step_on_all_ranks(ranks, stage, tmp_path: Path):
    for seen in ranks(2).run(train, stage, str(tmp_path)):
        assert [entry["changed"] for entry in seen] == [step not in PLANTED for step in range(8)]
        assert [entry["scale"] for entry in seen] == [1024, 1024, 512, 256, 256, 256, 128, 128]
        assert seen[-1]["skipped"] == len(PLANTED)


def follow(stage: int) -> dict[str, torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=make("plain"), config=fp16(stage, 1))[0]
    for step in range(8):
        engine.backward(engine(*micro_batch(step, 0, rank, world)))
        engine.step()
    whole = engine.module.state_dict()
    assert all(value.dtype == torch.float16 for value in whole.values())
    return {name: value.float() for name, value in whole.items()}


@pytest.mark.parametrize("stage", [0, 3])
def test_fp16_follows_fp32(ranks, stage):
    plain = train_plainly("plain", 2, 1, clip=0.5, steps=8)
    for ours in ranks(2).run(follow, stage):
        worst = max((ours[name] - plain[name]).abs().max().item() for name in plain)
        assert worst < 4e-3  # some fp16 roundings, and Adam steps of 1e-3 whose sign they may turn


def exhausted() -> str:
    resolved = fp16(2).model_copy(update={"fp16": Fp16Config(initial_scale_power=0, hysteresis=1)})
    engine = initialize(model=make("plain"), config=resolved)[0]
    with pytest.raises(RuntimeError) as caught:
        for micro in range(2):
            engine.backward(engine(*micro_batch(0, micro, dist.get_rank(), 2)) * 1e9)
            engine.step()
    return str(caught.value)


def test_an_overflow_that_no_scale_answers(ranks):
    assert all(text.startswith("step 1: gradients overflow at the smallest") for text in ranks(2).run(exhausted))
