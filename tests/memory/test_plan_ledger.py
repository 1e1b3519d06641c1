"""What `zerotop plan` says a rank's states take is, to the byte, what the engine's ledger counts; what it holds
meanwhile is never more than two units, and the root."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from runtime.api import initialize
from runtime.models.gpt import GPT
from runtime.models.presets import GPTConfig, unit_parameters
from runtime.plan import Workload, stage_layout
from tests.ranks import Ranks

SMALL = 500  # elements; norms are 36


def ledger_after_two_steps(shape: GPTConfig, stage: int, precision: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by category now, and the most there were."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": SMALL},
        "bf16": {"enabled": precision == "bf16"},
        "zerotop": {"telemetry": {"enabled": False}},
    }
    torch.manual_seed(0)
    engine, *_ = initialize(model=GPT(shape), config=config)
    tokens = torch.randint(shape.vocab_size, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(4):
        engine.backward(engine(tokens, tokens))
        engine.step()
    return engine.ledger.totals(), engine.ledger.peaks()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_plan_equals_ledger(
    ranks: Callable[[int], Ranks], world_size: int, stage: int, precision: str, tied: bool
) -> None:
    shape = GPTConfig(layers=4, heads=2, dim=36, vocab_size=65, max_seq_len=16, tied=tied)  # sizes that need padding
    work = Workload("small", tuple(unit_parameters(shape, SMALL)), shape, world_size, precision=precision)
    assert work.padded_parameters > work.parameters
    planned = stage_layout(work, stage).gpu
    for ledger, peaks in ranks(world_size).run(ledger_after_two_steps, shape, stage, precision):
        counted = {name: ledger[name] for name in ("parameters", "gradients", "masters", "optimizer")}
        assert counted == {name: planned[name] for name in counted}
        if stage < 3 or world_size == 1:
            assert ledger["communication"] == planned["buffers"]
        assert peaks["communication"] == planned["buffers"]
        assert {name: peaks[name] for name in counted} == counted
