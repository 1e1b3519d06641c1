"""Two engines whose models meet in one loss: each trains by its own backward only; where the script runs backward
itself, zero_grad() drops what the other's loss left, as in plain torch."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.numerics.training import HYPER, assert_equal, config, parameters

STEPS = 4


class Stack(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Linear(11, 7)) for _ in range(3))
        self.last = nn.Linear(7, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def pair() -> tuple[Stack, Stack]:
    torch.manual_seed(4)
    return Stack(1), Stack(7)


def sample(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)


def train(stage: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("runtime.engine")
    logger.addHandler(handler)
    critic, generator = (initialize(model=m, config=config(stage, 1, clip=0.0))[0] for m in pair())
    try:
        for step in range(STEPS):
            real, noise = sample(step, dist.get_rank())
            critic.zero_grad()
            critic.backward((critic(real) - critic(generator(noise).detach())).mean())
            critic.step()
            generator.zero_grad()
            generator.backward(-critic(generator(noise)).mean())
            generator.step()
            # The other way round, too: what the critic's loss leaves in the generator is nobody's.
            critic.backward((critic(real) - critic(generator(noise))).mean())
            critic.step()
    finally:
        logger.removeHandler(handler)
    return parameters(critic), parameters(generator), [text for text in heard if "were discarded" in text]


def train_by_loss_backward(stage: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    critic, generator = (initialize(model=m, config=config(stage, 1, clip=0.0))[0] for m in pair())
    for step in range(STEPS):
        real, noise = sample(step, dist.get_rank())
        for engine, loss in (
            (critic, lambda: (critic(real) - critic(generator(noise).detach())).mean()),  # noqa: B023
            (generator, lambda: -critic(generator(noise)).mean()),  # noqa: B023
            (critic, lambda: (critic(real) - critic(generator(noise))).mean()),  # noqa: B023
        ):
            critic.zero_grad()
            generator.optimizer.zero_grad()
            loss().backward()
            engine.step()
    return parameters(critic), parameters(generator)


def train_plainly() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    critic, generator = pair()
    for_critic, for_generator = (torch.optim.AdamW(m.parameters(), **HYPER) for m in (critic, generator))
    for step in range(STEPS):
        real, noise = (torch.cat(parts) for parts in zip(*(sample(step, rank) for rank in (0, 1)), strict=True))
        for optimizer, loss in (
            (for_critic, lambda: (critic(real) - critic(generator(noise).detach())).mean()),  # noqa: B023
            (for_generator, lambda: -critic(generator(noise)).mean()),  # noqa: B023
            (for_critic, lambda: (critic(real) - critic(generator(noise))).mean()),  # noqa: B023
        ):
            for_critic.zero_grad()
            for_generator.zero_grad()
            loss().backward()
            optimizer.step()
    return tuple({name: p.detach() for name, p in m.named_parameters()} for m in (critic, generator))  # type: ignore


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_engines_in_one_graph(ranks, stage):
    critic, generator = train_plainly()
    for rank, (ours, theirs, told) in enumerate(ranks(2).run(train, stage)):
        assert_equal(ours, critic)
        assert_equal(theirs, generator)
        assert len(told) == (2 if rank == 0 else 0)  # once an engine


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_script_that_runs_backward_and_zero_grad_itself(ranks, stage):
    critic, generator = train_plainly()
    for ours, theirs in ranks(2).run(train_by_loss_backward, stage):
        assert_equal(ours, critic)
        assert_equal(theirs, generator)
