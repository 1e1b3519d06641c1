"""Small models with awkward shapes: odd sizes, sizes below the world's, frozen, tied and unused parameters, no blocks
at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Uneven(nn.Module):
    """Token model with dimension 13: no size is a multiple of anything. `tied`: the head shares the embedding's
    weight."""

    def __init__(self, tied: bool = False, frozen: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.embedding = nn.Embedding(37, 13)
        self.blocks = nn.ModuleList(Block(13, 29) for _ in range(3))
        self.norm = nn.LayerNorm(13)
        self.head = nn.Linear(13, 37, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        if frozen:
            self.blocks[1].up.requires_grad_(False)
        self.idle = nn.Linear(5, 3) if unused else None

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Flatland(nn.Module):
    """No ModuleList anywhere: everything is the root unit."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 7)
        self.head = nn.Linear(7, 37)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.embedding(tokens)).flatten(0, 1), targets.flatten())


def make(kind: str) -> nn.Module:
    torch.manual_seed(1234)
    match kind:
        case "flatland":
            return Flatland()
        case "plain":
            return Uneven()
        case _:
            return Uneven(**{kind: True})


def batch(step: int, sample: int, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `sample` of step `step`'s global batch, (1, length) each."""
    generator = torch.Generator().manual_seed(step * 1000 + sample)
    row = torch.randint(37, (1, length + 1), generator=generator)
    return row[:, :-1], row[:, 1:]
