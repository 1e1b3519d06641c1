"""Offloaded activations under the engine: the same bits at every stage, and no parameter is taken for an activation."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from runtime.engine.initialize import initialize
from runtime.models.activations import offload_activations
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch, parameters


def train(kind: str, stage: int, precision: str, offload: bool):
    engine = initialize(model=make(kind), config=config(stage, 2, clip=0.5, precision=precision))[0]
    blocks = list(engine.module.blocks)
    ledger = engine.state.ledger
    activations = offload_activations(blocks, min_bytes=1, ledger=ledger) if offload else None
    losses = []
    for step in range(6):
        for micro in range(2):
            loss = engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size()))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    if activations is None:
        return losses, parameters(engine), 0
    assert ledger.offloaded()["activations"] > 0
    return losses, parameters(engine), activations.offloaded_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_at_every_stage(ranks, reference, stage, precision):
    plain = ranks(2).run(train, "plain", stage, precision, False)
    ours = ranks(2).run(train, "plain", stage, precision, True)
    of_stage_0 = reference(2, train, "plain", 0, precision, True)
    for (losses, values, _), (our_losses, our_values, nbytes), (_, _, expected) in zip(
        plain, ours, of_stage_0, strict=True
    ):
        assert our_losses == losses
        assert all((our_values[name] == value).all() for name, value in values.items())
        assert nbytes == expected > 0
