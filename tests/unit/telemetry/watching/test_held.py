"""Memory by category, by walking over modules and optimizers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from runtime.telemetry.watching.held import held_by


def test_parameters_gradients_states_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    before = held_by([model], [optimizer], "cpu").on_device
    assert before["parameters"] == before["gradients"] == 4 * (64 + 16)
    assert before["buffers"] == 4 * 16 + 8
    assert "optimizer" not in before
    optimizer.step()
    after = held_by([model], [optimizer], "cpu").on_device
    assert after["optimizer"] == 2 * 4 * (64 + 16) + 3 * 4  # two moments, and a step counter per parameter
    assert "masters" not in after


def test_shared_storage_counts_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    bucket = torch.zeros(100)
    model[0].weight.grad = bucket[:16].view(4, 4)
    held = held_by([model], [], "cpu").on_device
    assert held == {"parameters": 64, "gradients": 400}


def test_masters_of_a_16_bit_model_and_what_is_on_the_host() -> None:
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    masters = nn.Parameter(model.weight.detach().float())
    optimizer = torch.optim.AdamW([masters])
    held = held_by([model], [optimizer], "cuda")
    assert held.on_device == {}
    assert held.on_host == {"parameters": 32, "masters": 64}


def test_a_partition_of_deepspeed_s_counts_as_it_is_held() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_tensor = torch.zeros(8)  # type: ignore[assignment]
    engine_optimizer = SimpleNamespace(
        fp32_partitioned_groups_flat=[torch.zeros(8)],
        averaged_gradients={0: [torch.zeros(8, dtype=torch.bfloat16)]},
        optimizer=SimpleNamespace(state={0: {"exp_avg": torch.zeros(8), "step": 3}}),
    )
    held = held_by([model], [engine_optimizer], "cpu").on_device
    assert held == {"parameters": 32, "masters": 32, "gradients": 16, "optimizer": 32}
