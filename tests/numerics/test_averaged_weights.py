"""Weights that a model or a script writes itself: teachers that follow a student (MoCo, BYOL, DINO, BLIP) and clamped
temperatures, inside the model's forward and between steps. The same as in plain torch at every stage, with offload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime import zero
from runtime.engine.initialize import initialize
from tests.numerics.models import Uneven, batch
from tests.numerics.training import assert_equal, config, micro_batch, parameters

STEPS = 5
WRITES: dict[str, Callable[[nn.Parameter, nn.Parameter], Any]] = {
    "in place": lambda mean, weight: mean.mul_(0.9).add_(weight, alpha=0.1),
    "through .data": lambda mean, weight: mean.data.mul_(0.9).add_(weight.data, alpha=0.1),
}


class Taught(nn.Module):
    """A student, a frozen teacher that follows it, and a temperature that is kept small."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.inside = write, True
        self.student = Uneven()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(0.9))
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.add_(0.1)

    @torch.no_grad()
    def follow(self) -> None:
        for mean, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            WRITES[self.write](mean, weight)
        WRITES[self.write](self.temperature, torch.zeros_like(self.temperature))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.inside:
            self.follow()
        with torch.no_grad():
            target = self.teacher(tokens, targets)
        return (self.student(tokens, targets) - 0.5 * target).square() * self.temperature.exp()


def taught(write: str, inside: bool) -> Taught:
    torch.manual_seed(5)
    model = Taught(write)
    model.inside = inside
    return model


def plainly(write: str, inside: bool) -> dict[str, torch.Tensor]:
    model = taught(write, False)
    update = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    for step in range(STEPS):
        if inside:
            model.follow()
        update.zero_grad()
        for rank in range(2):
            rows = [batch(step, 2 * rank + sample) for sample in range(2)]
            (model(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])) / 2).backward()
        update.step()
        if not inside:
            model.follow()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_engine(write: str, inside: bool, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = initialize(model=taught(write, inside), config=settings)[0]
    for step in range(STEPS):
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), 2)))
        engine.step()
        if not inside:
            with zero.GatheredParameters(engine.module.parameters(), modifier_rank=0):
                if dist.get_rank() == 0:
                    engine.module.follow()
    return parameters(engine)


def settings_of(stage: int, offload: bool, threshold: int = 0) -> dict[str, Any]:
    settings = config(stage, 1, clip=0.0)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return settings


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize(("stage", "offload"), [(1, True), (2, False), (2, True), (3, False), (3, True)])
def test_what_a_forward_writes_is_kept(ranks, stage, offload, write):
    plain = plainly(write, True)
    for ours in ranks(2).run(with_engine, write, True, settings_of(stage, offload)):
        assert_equal(ours, plain)


@pytest.mark.parametrize(("stage", "threshold"), [(0, 0), (2, 0), (3, 0), (3, 100_000)])
def test_every_rank_keeps_what_the_modifier_rank_writes_also_into_frozen_parameters(ranks, stage, threshold):
    plain = plainly("in place", False)
    for ours in ranks(2).run(with_engine, "in place", False, settings_of(stage, False, threshold)):
        assert_equal(ours, plain)
