"""Parameters after 20 steps equal a plain single-process AdamW on the whole batch, per parameter, at every stage and
world size."""

from __future__ import annotations

import pytest
import torch

from tests.harness.grids import pairwise
from tests.numerics.training import (
    assert_equal,
    config,
    train_plainly,
    train_plainly_in_bf16,
    train_with_engine,
)


@pytest.mark.parametrize(
    ("world", "stage", "steps"), pairwise([1, 2, 3, 4], [0, 1, 2, 3], [(1, 0.5), (3, 0.5), (3, 0.0)])
)
def test_fp32_equals_plain_adamw(ranks, world, stage, steps):
    accumulation, clip = steps
    plain = train_plainly("plain", world, accumulation, clip)
    for ours, _, _ in ranks(world).run(train_with_engine, "plain", config(stage, accumulation, clip)):
        assert_equal(ours, plain)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["tied", "frozen", "unused", "flatland"])
def test_awkward_models(ranks, kind, stage):
    plain = train_plainly(kind, 2, 2, clip=0.0)
    for ours, _, _ in ranks(2).run(train_with_engine, kind, config(stage, 2, clip=0.0)):
        assert_equal(ours, plain)


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad"])
def test_other_elementwise_optimizers(ranks, optimizer):
    plain = train_plainly("plain", 2, 1, clip=1.0, optimizer=optimizer, steps=8)
    for stage in (2, 3):
        for ours, _, _ in ranks(2).run(train_with_engine, "plain", config(stage, 1, clip=1.0, optimizer=optimizer), 8):
            assert_equal(ours, plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threshold", [0, 100])
def test_stages_2_and_3_give_the_same_bits(ranks, precision, threshold):
    outcomes = []
    for stage in (2, 3):
        settings = config(stage, 2, clip=0.5, precision=precision)
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        outcomes.append(ranks(3).run(train_with_engine, "plain", settings)[1])
    (second, losses_2, norms_2), (third, losses_3, norms_3) = outcomes
    assert (losses_2, norms_2) == (losses_3, norms_3)
    for name, value in second.items():
        assert torch.equal(value, third[name]), name


def test_all_ranks_hold_the_same_bits_and_the_same_seed_gives_them_again(ranks):
    first = ranks(3).run(train_with_engine, "plain", config(2, 2, clip=1.0))
    again = ranks(3).run(train_with_engine, "plain", config(2, 2, clip=1.0))
    for ours, _, norms in [*first, *again]:
        assert norms == first[0][2]
        for name, value in ours.items():
            assert torch.equal(value, first[0][0][name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 3), (4, 1)])
def test_bf16_follows_fp32_masters(ranks, world, stage, accumulation):
    plain, plain_losses = train_plainly_in_bf16("plain", world, accumulation, clip=0.5)
    results = ranks(world).run(train_with_engine, "plain", config(stage, accumulation, clip=0.5, precision="bf16"))
    losses = [sum(per_rank) / world for per_rank in zip(*(losses for _, losses, _ in results), strict=True)]
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) <= 2e-3
    for ours, _, _ in results:
        # One bf16 ulp near the largest weight: masters agree to fp32 rounding, and rounding them to bf16 may fall
        # either way.
        assert_equal(ours, plain, tolerance=8e-3)
        assert all(p.dtype == torch.bfloat16 for p in ours.values())
