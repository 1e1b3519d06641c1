"""Every way to accumulate and to reduce gives plain AdamW: no_sync, local, divided before or after, in other
precisions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.engine.initialize import initialize
from tests.harness.grids import pairwise
from tests.numerics.models import make
from tests.numerics.training import assert_equal, config, micro_batch, train_plainly, train_with_engine

STEPS = 8


def with_no_sync(stage: int, precision: str) -> tuple[dict[str, torch.Tensor], int, int]:
    """Accumulation by hand: three backwards, two of them inside no_sync(). Returns the parameters, and how many
    reductions the first and the last step issued."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=make("plain"), config=config(stage, 1, clip=0.0, precision=precision))[0]
    issued: list[str] = []
    for name in ("reduce_scatter", "all_reduce"):
        original = getattr(engine.comm, name)
        setattr(engine.comm, name, lambda *a, original=original, name=name: (issued.append(name), original(*a))[1])
    counts = []
    for step in range(STEPS):
        issued.clear()
        for micro in range(3):
            with engine.no_sync() if micro < 2 else nullcontext():
                engine.backward(engine(*micro_batch(step, micro, rank, world)) / 3)
        engine.step()
        counts.append(len(issued))
    return {n: v.clone() for n, v in engine.module.state_dict().items()}, counts[0], counts[-1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_sync_reduces_once_at_every_stage(ranks, stage):
    plain = train_plainly("plain", 2, 3, clip=0.0, steps=STEPS)
    for ours, first, last in ranks(2).run(with_no_sync, stage, "fp32"):
        assert_equal(ours, plain)
        assert first == last == 6 + 1  # six units, and the norm


def reductions(settings: dict[str, Any]) -> tuple[int, int, int]:
    """How many a step issues; gradient bytes kept after it, and those of one whole fp32 copy."""
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=make("plain"), config=settings)[0]
    count = 0
    original = engine.comm.reduce_scatter

    def counting(buffer: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        return original(buffer)

    engine.comm.reduce_scatter = counting
    for micro in range(3):
        engine.backward(engine(*micro_batch(0, micro, rank, world)))
        engine.step()
    return count, engine.state.ledger.totals()["gradients"], 4 * sum(flat.layout.numel for flat in engine.state.flats)


@pytest.mark.parametrize("stage", [2, 3])
def test_local_accumulation_reduces_once_and_keeps_whole_gradients(ranks, stage):
    local = {**config(stage, 3, clip=0.5), "zerotop": {"accumulate": "local"}}
    plain = train_plainly("plain", 2, 3, clip=0.5)
    for ours, _, _ in ranks(2).run(train_with_engine, "plain", local):
        assert_equal(ours, plain)
    assert ranks(2).run(reductions, local)[0] == (6, *[ranks(2).run(reductions, local)[0][2]] * 2)
    count, kept, whole = ranks(2).run(reductions, config(stage, 3, clip=0.5))[0]
    assert (count, kept) == (18, whole // 2)


@pytest.mark.parametrize(
    "extra",
    [
        {"prescale_gradients": True},
        {"gradient_predivide_factor": 2.0},
        {"communication_data_type": "fp32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_dividing_before_or_after_is_the_same_mean(ranks, reference, stage, extra):
    plain = train_plainly("plain", 2, 3, clip=0.5)
    outcomes = ranks(2).run(train_with_engine, "plain", config(stage, 3, clip=0.5, **extra))
    for ours, _, _ in outcomes:
        assert_equal(ours, plain)
    norms = outcomes[0][2]
    usual = reference(2, train_with_engine, "plain", config(stage, 3, clip=0.5))[0][2]
    assert norms == pytest.approx(usual, rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}], ids=str)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_sum_over_two_ranks_is_twice_the_mean(ranks, stage, extra):
    def trained(op: str, lr: float, clip: float) -> Any:
        settings = config(stage, 3, clip=clip, optimizer="SGD", gradient_allreduce_op=op, **extra)
        settings["optimizer"]["params"]["lr"] = lr
        return ranks(2).run(train_with_engine, "plain", settings)[0]

    mean, _, mean_norms = trained("mean", 0.2, 0.5)
    total, _, norms = trained("sum", 0.1, 1.0)
    assert norms == pytest.approx([2 * norm for norm in mean_norms], rel=1e-5)
    assert_equal(total, mean)


@pytest.mark.parametrize(
    ("stage", "communicate", "accumulate"), pairwise([0, 1, 2, 3], ["fp32", "bf16"], ["fp32", "bf16"])
)
def test_precisions_of_accumulation_and_communication(ranks, reference, stage, communicate, accumulate):
    settings = config(
        stage, 2, clip=0.5, precision="bf16",
        communication_data_type=communicate, data_types={"grad_accum_dtype": accumulate},
    )  # fmt: skip
    usual = reference(2, train_with_engine, "plain", config(stage, 2, clip=0.5, precision="bf16"))[0]
    found = ranks(2).run(train_with_engine, "plain", settings)
    assert found[0][2] == found[1][2]
    assert found[0][1] == pytest.approx(usual[1], abs=2e-3)


def used_types(settings: dict[str, Any]) -> set[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = initialize(model=make("plain"), config=settings)[0]
    seen = set()
    original = engine.comm.reduce_scatter
    engine.comm.reduce_scatter = lambda buffer: (seen.add(str(buffer.dtype)), original(buffer))[1]
    engine.backward(engine(*micro_batch(0, 0, rank, world)))
    engine.step()
    return seen


def test_communication_data_type_is_what_travels(ranks):
    for stage, asked, expected in (
        (1, None, "torch.float32"), (2, None, "torch.bfloat16"), (3, None, "torch.bfloat16"),
        (1, "bf16", "torch.bfloat16"), (2, "fp32", "torch.float32"),
    ):  # fmt: skip
        extra = {"communication_data_type": asked} if asked else {}
        assert ranks(2).run(used_types, config(stage, 1, 0.0, "bf16", **extra)) == [{expected}] * 2, (stage, asked)
