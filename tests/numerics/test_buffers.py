"""Buffers keep the dtype that they came with: rotary tables stay exact, and norms with running statistics train and
evaluate in 16 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime.engine.initialize import initialize
from tests.numerics.training import config


class Rotary(nn.Module):
    """As transformers has it: the table is made in fp32 from a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, 64, 2).float() / 64), persistent=False)
        self.project = nn.Linear(32, 1)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        return (positions[:, None].float() * self.inv_freq.float()).cos()

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return self.project(self.table(positions).to(self.project.weight.dtype)).square().mean()


class Wide(nn.Module):
    """Adds its fp32 buffer to what is 16-bit, and does not cast the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("shift", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) + self.shift).square().mean()


def engine_of(model: nn.Module, stage: int, **more: Any) -> Any:
    return initialize(model=model, config={**config(stage, 1, clip=0.0, precision="bf16"), **more})[0]


def rotary(stage: int) -> float:
    model, positions = Rotary(), torch.arange(4096)
    expected = model.table(positions)
    engine = engine_of(model, stage)
    engine.backward(engine(positions))
    engine.step()
    assert engine.module.inv_freq.dtype == torch.float32
    return (engine.module.table(positions) - expected).abs().max().item()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rotary_table_is_exact_at_every_position(ranks, stage):
    assert ranks(2).run(rotary, stage) == [0.0, 0.0]


def dtypes_by_choice() -> tuple[str, list[torch.dtype]]:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    engine = engine_of(Wide(), 1)
    try:
        engine(x)
        note = ""
    except RuntimeError as error:
        note = " ".join(error.__notes__)
    chosen = engine_of(Wide(), 1, zerotop={"buffer_dtype": "bf16"})
    chosen.backward(chosen(x))
    mine = engine_of(Wide().bfloat16(), 1)  # what the script converted stays as it is
    mine.backward(mine(x))
    return note, [e.module.shift.dtype for e in (engine, chosen, mine)]


def test_a_buffer_is_as_it_came_unless_the_config_says_otherwise(ranks):
    for note, dtypes in ranks(2).run(dtypes_by_choice):
        assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
        assert "1 buffers are wider (shift)" in note and '"buffer_dtype": "bf16"' in note


# ---- norms with running statistics -----------------------------------------------------------------------------------
def normed(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if kind == "BatchNorm1d":
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)), (4, 8)
    if kind == "no affine":
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 1)), (4, 8)
    if kind == "BatchNorm2d":
        norm: nn.Module = nn.BatchNorm2d(4)
    else:
        norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(144, 1)), (4, 3, 8, 8)


def sample(step: int, rank: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + rank))


def run_norm(kind: str, stage: int) -> tuple[float, dict[str, torch.dtype], dict[str, torch.Tensor], list[float]]:
    model, shape = normed(kind)
    engine = engine_of(copy.deepcopy(model), stage)
    losses, rank = [], dist.get_rank()
    for step in range(8):
        engine.train()
        loss = engine(sample(step, 0, shape).bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        evaluated = engine(sample(99, rank, shape).bfloat16()).float().abs().max().item()
    assert engine.skipped_steps == 0
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    return evaluated, {name: value.dtype for name, value in state.items()}, state, losses


def run_norm_plainly(kind: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, shape = normed(kind)
    update = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    losses = []
    for step in range(8):
        loss = model(sample(step, 0, shape)).square().mean()
        loss.backward()
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    return model.state_dict(), losses


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm2d", "no affine"])
def test_norms_with_running_statistics_train_and_evaluate(ranks, kind):
    plain, plain_losses = run_norm_plainly(kind)
    for stage in (0, 2, 3):
        for evaluated, dtypes, state, losses in ranks(2).run(run_norm, kind, stage):
            assert 0 < evaluated < 100
            assert dtypes["1.running_mean"] == dtypes["1.running_var"] == torch.float32
            assert dtypes["0.weight"] == torch.bfloat16
            assert losses == pytest.approx(plain_losses, rel=0.05, abs=0.01)
            for name in ("1.running_mean", "1.running_var"):
                torch.testing.assert_close(state[name], plain[name], atol=0.02, rtol=0.05)


def converted_by_the_script() -> dict[str, torch.dtype]:
    model, shape = normed("BatchNorm1d")
    engine = engine_of(model.bfloat16(), 2)
    engine.backward(engine(sample(0, 0, shape).bfloat16()).float().square().mean())
    engine.step()
    return {name: value.dtype for name, value in engine.module.state_dict().items() if value.is_floating_point()}


def test_a_norm_that_the_script_converted_stays_so(ranks):
    for dtypes in ranks(2).run(converted_by_the_script):
        assert set(dtypes.values()) == {torch.bfloat16}
