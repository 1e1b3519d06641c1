"""Stage 3 with models that use or pass on parameters and outputs in unusual places: the losses of stage 2."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.numerics.models import Uneven
from tests.numerics.test_gathering import started, step


class Parts(Uneven):
    """Calls the parts of its blocks, never the blocks."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = x + block.down(F.gelu(block.up(block.norm(x))))
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Functional(Uneven):
    """Uses the embedding's weight once more, as a matrix."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)) + F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Besides(Uneven):
    """Has other lists of modules and of parameters beside its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(13, 13) for _ in range(3))
        self.named = nn.ModuleDict({f"n{i}": nn.Linear(13, 13) for i in range(3)})
        self.matrices = nn.ParameterList(nn.Parameter(torch.randn(13, 13) * 0.1) for _ in range(3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for i, block in enumerate(self.blocks):
            x = self.named[f"n{i}"](self.adapters[i](block(x))) + x @ self.matrices[i]
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


@dataclass
class Packed:
    hidden: torch.Tensor


class PackedOutputs(Uneven):
    """Its blocks return objects, and leave a loss of their own in an attribute, computed last."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            block.forward = partial(_packed, block)  # type: ignore[method-assign]
            x = block(x).hidden
        extra = sum(block.extra for block in self.blocks)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten()) + 0.1 * extra


def _packed(block: nn.Module, x: torch.Tensor) -> Packed:
    out = Packed(type(block).forward(block, x))
    block.extra = block.up(x).square().mean()
    return out


class PassedOn(Uneven):
    """Its blocks hand on a bias that the first one has made, and what the last one returns goes through a module that
    leaves it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x, bias = self.embedding(tokens) * self.scale, None
        for block in self.blocks:
            block.forward = partial(_biased, block)  # type: ignore[method-assign]
            x, bias = block(x, bias)
        return F.cross_entropy(self.head(self.norm(self.dropout(x))).float().flatten(0, 1), targets.flatten())


def _biased(block: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    bias = block.norm(x) if bias is None else bias
    return type(block).forward(block, x) + bias, bias


class Experts(nn.Module):
    """The largest list of modules holds experts, and which of them a rank uses depends on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 13)
        self.blocks = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(13, 64), nn.GELU(), nn.Linear(64, 13)) for _ in range(4))
        self.head = nn.Linear(13, 37, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        chosen = sorted({int(tokens[0, 0]) % 4, int(tokens[0, 1]) % 4})
        x = x + sum(self.experts[index](x) for index in chosen)
        return F.cross_entropy(self.head(x).float().flatten(0, 1), targets.flatten())


UNUSUAL: dict[str, Any] = {
    "parts": Parts,
    "functional": Functional,
    "besides": Besides,
    "packed": PackedOutputs,
    "passed on": PassedOn,
    "experts": Experts,
}


def unusual_model(kind: str, stage: int) -> tuple[list[float], list[str]]:
    torch.manual_seed(11)
    engine = started(model=UNUSUAL[kind](), stage=stage)
    losses = [step(engine, number) for number in range(5)]
    assert engine.skipped_steps == 0
    return losses, [unit.name for unit in engine.state.units if unit.keep_unsharded]


@pytest.mark.parametrize("kind", list(UNUSUAL))
def test_parameters_used_in_unusual_places(ranks, kind):
    second, third = (ranks(2).run(unusual_model, kind, stage) for stage in (2, 3))
    assert [losses for losses, _ in second] == [losses for losses, _ in third]
    assert ("embedding" in third[0][1]) == (kind == "functional")
