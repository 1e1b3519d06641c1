"""Every way in which scripts run backward gives plain torch's numbers: several before one step, the script's own
loss.backward(), accelerate's accumulation, modules used several times under re-entrant checkpointing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.engine.initialize import initialize
from tests.numerics.models import Uneven, batch, make
from tests.numerics.test_fp16 import fp16
from tests.numerics.training import HYPER, assert_equal, config, message_of, micro_batch

STEPS = 4


class Reentrant(Uneven):
    """Every block runs under re-entrant checkpointing, `passes` times."""

    def __init__(self, passes: int = 1) -> None:
        super().__init__()
        self.passes = passes

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for _ in range(self.passes):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
        return nn.functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return {"plain": lambda: make("plain"), "reentrant": Reentrant, "twice": lambda: Reentrant(2)}[kind]()


def plainly(kind: str, accumulation: int) -> dict[str, torch.Tensor]:
    """One process, the whole batch."""
    model = model_of(kind)
    update = torch.optim.AdamW(model.parameters(), **HYPER)
    for step in range(STEPS):
        rows = [batch(step, sample) for sample in range(2 * 2 * accumulation)]
        model(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])).backward()
        update.step()
        update.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def whole(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.module.state_dict()
    return {name: state[name].clone() for name, _ in engine.module.named_parameters()}


def loss_of(engine: Any, step: int, micro: int) -> torch.Tensor:
    return engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size()))


def sums(engine: Any, step: int) -> None:
    """Two halves of a batch, one backward each, one step: gradients add up."""
    for micro in range(2):
        engine.backward(loss_of(engine, step, micro) / 2)
    engine.step()


def as_accelerate(engine: Any, step: int) -> None:
    """backward() for every micro-batch, step() only where gradients are synchronised."""
    for micro in range(2):
        engine.set_gradient_accumulation_boundary(is_boundary=micro == 1)
        engine.backward(loss_of(engine, step, micro))
    engine.step()


def by_the_script(engine: Any, step: int) -> None:
    for micro in range(2):
        engine.zero_grad()
        loss_of(engine, step, micro).backward()
        engine.step()


def by_the_script_in_one(engine: Any, step: int) -> None:
    engine.optimizer.zero_grad()
    (sum(loss_of(engine, step, micro) for micro in range(2)) / 2).backward()
    engine.step()


def scaled_by_the_script(engine: Any, step: int) -> None:
    """What transformers.Trainer does: the loss is divided already."""
    for micro in range(2):
        half = engine.backward(loss_of(engine, step, micro) / 2, scale_wrt_gas=False)
        assert half.item() > 0
        engine.step()


CALLS: dict[str, tuple[Callable[[Any, int], None], int]] = {
    "sums": (sums, 1),
    "accelerate": (as_accelerate, 2),
    "script": (by_the_script, 2),
    "script in one": (by_the_script_in_one, 1),
    "scaled": (scaled_by_the_script, 2),
}


def train(calls: str, kind: str, stage: int) -> tuple[dict[str, torch.Tensor], int]:
    run, accumulation = CALLS[calls]
    engine = initialize(model=model_of(kind), config=config(stage, accumulation, clip=0.0))[0]
    for step in range(STEPS):
        run(engine, step)
    return whole(engine), engine.global_steps


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("calls", list(CALLS))
def test_whatever_way_backward_is_called(ranks, calls, stage):
    for kind in ("plain", "twice") if calls in ("sums", "script") else ("plain",):
        plain = plainly(kind, 2)
        for ours, steps in ranks(2).run(train, calls, kind, stage):
            assert_equal(ours, plain)
            assert steps == STEPS


def train_together(stage: int) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Of two engines: trained by one loss that both share, and each by itself."""
    together, apart = [[initialize(model=model_of("plain"), config=config(stage, 1, clip=0.0))[0] for _ in range(2)]
                       for _ in range(2)]  # fmt: skip
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        batches = [micro_batch(step, micro, rank, world) for micro in range(2)]
        sum(engine.module(*batch) for engine, batch in zip(together, batches, strict=True)).backward()
        for engine in together:
            engine._backward_epilogue()
        for engine in together:
            engine.step()
            engine.optimizer.zero_grad()
        for engine, one in zip(apart, batches, strict=True):
            engine.backward(engine(*one))
            engine.step()
    return [(whole(one), whole(other)) for one, other in zip(together, apart, strict=True)]


@pytest.mark.parametrize("stage", [1, 3])
def test_engines_that_share_a_loss(ranks, stage):
    for pairs in ranks(2).run(train_together, stage):
        for together, apart in pairs:
            assert_equal(together, apart)


def train_unmanaged(stage: int, offload: bool) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, bool]], str]:
    """As many backwards before a step() as there are micro-batches, which the config's accumulation does not count."""
    settings = {**config(stage, 2, clip=0.0), "managed_gradient_accumulation": False}
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = initialize(model=model_of("plain"), config=settings)[0]
    seen = []
    for step in range(STEPS):
        for micro in range(2):
            engine.backward(loss_of(engine, step, micro))
        engine.step()
        seen.append((engine.global_steps, engine.global_samples, engine.is_gradient_accumulation_boundary()))
    problem = message_of(AssertionError, lambda: engine.set_gradient_accumulation_boundary(False))
    return whole(engine), seen, problem


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, True), (2, False), (2, True), (3, False), (3, True)])
def test_every_step_ends_an_accumulation_that_is_not_managed(ranks, stage, offload):
    plain = plainly("plain", 2)
    for ours, seen, problem in ranks(2).run(train_unmanaged, stage, offload):
        assert_equal(ours, plain)
        assert seen == [(step, 8 * step, True) for step in range(1, STEPS + 1)]
        assert "every engine.step() is a boundary" in problem


def one_backward(kind: str, stage: int, accumulation: int) -> tuple[dict[str, torch.Tensor], list[str]]:
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("runtime.engine").addHandler(handler)
    engine = initialize(model=model_of(kind), config=config(stage, accumulation, clip=0.0))[0]
    for step in range(STEPS):
        for micro in range(accumulation):
            engine.backward(loss_of(engine, step, micro))
            engine.step()
    logging.getLogger("runtime.engine").removeHandler(handler)
    return whole(engine), heard


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_modules_used_twice_under_reentrant_checkpointing(ranks, stage):
    for accumulation in (1, 2):
        plain = plainly("twice", accumulation)
        for rank, (ours, heard) in enumerate(ranks(2).run(one_backward, "twice", stage, accumulation)):
            assert_equal(ours, plain)
            assert [("use_reentrant=False" in text) for text in heard] == [True] * (rank == 0)


def values_and_refusals() -> list[str]:
    engine = initialize(model=make("plain"), config=config(1, 4, clip=0.0))[0]
    loss = loss_of(engine, 0, 0)
    assert engine.backward(loss).item() == pytest.approx(loss.item() / 4)
    engine.step()
    norms = []
    for by_the_script in (False, True):
        half = initialize(model=make("plain"), config=fp16(1, 1))[0]
        loss = loss_of(half, 0, 0)
        half.scale(loss).backward() if by_the_script else half.backward(loss)
        half.step()
        norms.append(half.get_global_grad_norm())
    assert norms[0] == norms[1] and half.loss_scale == 1024
    refused = message_of(RuntimeError, lambda: loss_of(half, 1, 0).backward())
    loss_of(engine, 0, 1).backward()
    return [refused, message_of(RuntimeError, engine.zero_grad)]


def test_what_backward_returns_and_refuses(ranks):
    for without_scale, zero_grad in ranks(2).run(values_and_refusals):
        assert "engine.scale(loss)" in without_scale
        assert "middle of an accumulation" in zero_grad


# ---- gradients that scripts look for ---------------------------------------------------------------------------------
def clips_by_itself(stage: int) -> tuple[list[str], float]:
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("runtime.engine").addHandler(handler)
    engine = initialize(model=make("plain"), config=config(stage, 2, clip=0.0))[0]
    for step in range(2):
        for micro in range(2):
            engine.module.zero_grad()
            engine.backward(loss_of(engine, step, micro))
            if micro == 1:
                torch.nn.utils.clip_grad_norm_(engine.module.parameters(), 0.1)
            engine.step()
    logging.getLogger("runtime.engine").removeHandler(handler)
    assert all(type(p).__name__ in ("Parameter", "ReshardedParameter") for p in engine.module.parameters())
    return heard, engine.get_global_grad_norm()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_script_that_clips_by_itself_is_told_once(ranks, stage):
    first, second = (heard for heard, _ in ranks(2).run(clips_by_itself, stage))
    assert len(first) == 1 and "gradient_clipping" in first[0] and "safe_get_full_grad" in first[0]
    assert second == []
