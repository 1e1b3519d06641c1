"""Small models with awkward shapes: odd sizes, sizes below the world's, frozen, tied and unused parameters, no blocks
at all."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


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


class Winding(Uneven):
    """Takes another way through its blocks at each call: backwards, one of them twice, one not at all."""

    WAYS = ((0, 1, 2), (2, 1, 0), (0, 0, 2), (1,))

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for index in self.WAYS[self.calls % len(self.WAYS)]:
            x = self.blocks[index](x)
        self.calls += 1
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Checkpointed(Uneven):
    """Its blocks compute their activations again in backward, two of them in one segment."""

    reentrant = False

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        first, second, third = self.blocks
        x = checkpoint(lambda y: second(first(y)), x, use_reentrant=self.reentrant)
        x = checkpoint(third, x, use_reentrant=self.reentrant)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


class Reentrant(Checkpointed):
    reentrant = True


class Nested(Uneven):
    """The first block calls the second inside its own forward."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        first, second, third = self.blocks
        first.inner = [second]  # a list: not a submodule
        x = third(_with_inner(first, x))
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def _with_inner(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    forward = type(block).forward
    block.forward = lambda y: forward(block, block.inner[0](forward(block, y)))  # type: ignore[method-assign]
    try:
        return block(x)
    finally:
        del block.forward


class Normed(Uneven):
    """With batch norm, whose statistics are buffers, and an output that is a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(13)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        x = self.batch_norm(x.transpose(1, 2)).transpose(1, 2)
        loss = F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())
        return {"loss": loss, "features": x}


class Mixed(Uneven):
    """Two dtypes in one unit: the blocks' second halves are in bf16, whatever the rest is."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.down.to(torch.bfloat16)
            block.forward = partial(_mixed, block)  # type: ignore[method-assign]


def _mixed(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.down(F.gelu(block.up(block.norm(x))).to(torch.bfloat16)).float()


KINDS = {
    "mixed": Mixed,
    "flatland": Flatland,
    "plain": Uneven,
    "winding": Winding,
    "checkpointed": Checkpointed,
    "reentrant": Reentrant,
    "nested": Nested,
    "normed": Normed,
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(1234)
    return KINDS[kind]() if kind in KINDS else Uneven(**{kind: True})


def batch(step: int, sample: int, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `sample` of step `step`'s global batch, (1, length) each."""
    generator = torch.Generator().manual_seed(step * 1000 + sample)
    row = torch.randint(37, (1, length + 1), generator=generator)
    return row[:, :-1], row[:, 1:]
