"""The cross-entropy in chunks under the engine: the head's weight is read outside its module, tied or not, and some
ranks have no counted target."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime.engine.initialize import initialize
from runtime.models.cross_entropy import chunked_cross_entropy
from tests.numerics.models import Uneven
from tests.numerics.training import config, micro_batch

STEPS = 8


class Chunked(Uneven):
    """Its loss is the mean of the whole global batch's counted targets, as the built-in trainer's."""

    chunked = True

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        x, targets = self.norm(x).flatten(0, 1), targets.flatten()
        if self.chunked:
            return chunked_cross_entropy(x, self.head.weight, targets, chunk_tokens=3) * factor
        return F.cross_entropy(self.head(x).float(), targets, reduction="sum") * factor


def model(tied: bool, frozen_head: bool, chunked: bool = True) -> nn.Module:
    torch.manual_seed(5)
    made = Chunked(tied=tied)
    made.chunked = chunked
    made.head.weight.requires_grad_(not frozen_head)
    return made


def masked_batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every third token counts; on rank 1 none in every other step."""
    tokens, targets = micro_batch(step, 0, rank, world)
    targets = targets.clone()
    targets.flatten()[torch.arange(targets.numel()) % 3 != 0] = -100
    if rank == 1 and step % 2:
        targets.fill_(-100)
    return tokens, targets


def counted(step: int, world: int) -> int:
    return sum(int((masked_batch(step, rank, world)[1] != -100).sum()) for rank in range(world))


def train(stage: int, tied: bool, frozen_head: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=model(tied, frozen_head), config=config(stage, 1, clip=0.5))[0]
    losses = []
    for step in range(STEPS):
        loss = engine(*masked_batch(step, rank, world), factor=world / counted(step, world))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(engine(*masked_batch(0, 0, world)).item())
    state = engine.module.state_dict()
    return {name: state[name].clone() for name, _ in engine.module.named_parameters()}, losses


def train_plainly(tied: bool, frozen_head: bool, world: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    plain = model(tied, frozen_head, chunked=False)
    update = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        rows = [masked_batch(step, rank, world) for rank in range(world)]
        loss = plain(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows]), 1 / counted(step, world))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        update.step()
        update.zero_grad()
        losses.append(loss.item())
    losses.append(plain(*masked_batch(0, 0, world)).item())
    return dict(plain.named_parameters()), losses


@pytest.mark.parametrize(("tied", "frozen_head"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_engine_trains_as_plain_torch_with_whole_logits(ranks, stage, tied, frozen_head):
    results = ranks(2).run(train, stage, tied, frozen_head)
    expected, plain_losses = train_plainly(tied, frozen_head, 2)
    for step, of_ranks in enumerate(zip(*(losses for _, losses in results), strict=True)):
        assert sum(of_ranks) / 2 == pytest.approx(plain_losses[step], abs=5e-6 if step < STEPS else 1e-4), step
    for found, _ in results:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-5, name
