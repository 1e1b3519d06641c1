"""Offloaded optimizer states and parameters: the same bits as without, at every stage, overlapped or not, whatever stays
on the device; and parameters that are read only when they are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from runtime.api import initialize
from tests.numerics.models import Uneven, make
from tests.numerics.test_parity import assert_equal, config, micro_batch, train_plainly, train_with_engine

STEPS = 6


def offloaded(settings: dict[str, Any], overlap: bool = True, ratio: float = 1.0) -> dict[str, Any]:
    zero = {**settings["zero_optimization"], "offload_optimizer": {"device": "cpu", "ratio": ratio}}
    if zero["stage"] == 3:
        zero["offload_param"] = {"device": "cpu"}
    return {**settings, "zero_optimization": zero, "zerotop": {"offload": {"overlap": overlap}}}


def train(kind: str, settings: dict[str, Any], steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    whole, losses, _ = train_with_engine(kind, settings, steps)
    return whole, losses


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Of every rank."""
    for (mine, my_losses), (other, other_losses) in zip(ours, theirs, strict=True):
        assert my_losses == other_losses
        for name, value in other.items():
            assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_the_same_bits_as_without_offload(ranks, world, stage, precision):
    settings = config(stage, 2, clip=0.5, precision=precision)
    resident = ranks(world).run(train, "plain", settings)
    for overlap in (True, False):
        assert_same_bits(ranks(world).run(train, "plain", offloaded(settings, overlap)), resident)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.8])
def test_whatever_stays_on_the_device(ranks, ratio):
    settings = config(2, 1, clip=0.5, precision="bf16")
    resident = ranks(2).run(train, "plain", settings)
    assert_same_bits(ranks(2).run(train, "plain", offloaded(settings, ratio=ratio)), resident)


@pytest.mark.parametrize("kind", ["tied", "frozen", "unused", "flatland", "winding", "nested", "checkpointed"])
@pytest.mark.parametrize("stage", [2, 3])
def test_awkward_models(ranks, kind, stage):
    settings = config(stage, 2, clip=0.0)
    resident = ranks(2).run(train, kind, settings)
    assert_same_bits(ranks(2).run(train, kind, offloaded(settings)), resident)


def test_parity_with_plain_adamw(ranks):
    plain = train_plainly("plain", 2, 3, clip=0.5)
    for ours, _, _ in ranks(2).run(train_with_engine, "plain", offloaded(config(2, 3, clip=0.5))):
        assert_equal(ours, plain)


def test_other_optimizers(ranks):
    settings = config(2, 1, clip=0.5, optimizer="Adagrad")
    resident = ranks(2).run(train, "plain", settings)
    assert_same_bits(ranks(2).run(train, "plain", offloaded(settings)), resident)
