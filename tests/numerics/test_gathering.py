"""Stage 3 with whatever models and scripts bring: the same results as stage 2, two units at a time, and parameters that
can be asked for."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime import zero
from runtime.comm.group import SHARED_MEMORY_VARIABLE
from runtime.engine.initialize import initialize
from tests.numerics.models import Uneven, make
from tests.numerics.training import assert_equal, config, micro_batch, train_plainly, train_with_engine


def started(kind: str = "plain", stage: int = 3, precision: str = "fp32", model: nn.Module | None = None) -> Any:
    return initialize(model=model or make(kind), config=config(stage, 1, clip=0.0, precision=precision))[0]


def step(engine: Any, number: int) -> float:
    loss = engine(*micro_batch(number, 0, dist.get_rank(), dist.get_world_size()))
    engine.backward(loss)
    engine.step()
    return loss.item()


@contextmanager
def warnings_of_engine() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("runtime.engine")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# ---- models ---------------------------------------------------------------------------------------------
def losses_of(kind: str, stage: int) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    with warnings_of_engine() as warnings:
        engine = started(kind, stage)
        losses = [step(engine, number) for number in range(8)]
    return losses, {name: value.clone() for name, value in engine.module.state_dict().items()}, warnings


@pytest.mark.parametrize("kind", ["winding", "checkpointed", "reentrant", "nested", "mixed"])
def test_any_way_through_the_model_gives_stage_2s_bits(ranks, kind):
    second, third = (ranks(2).run(losses_of, kind, stage)[0] for stage in (2, 3))
    assert second[0] == third[0]
    for name, value in second[1].items():
        assert torch.equal(value, third[1][name]), name
    different_ways = [line for line in third[2] if "order of this model's modules varies" in line]
    assert len(different_ways) == (1 if kind == "winding" else 0)


def batch_norm_model() -> tuple[float, torch.Tensor]:
    results = []
    for stage in (2, 3):
        engine = started("normed", stage)
        for number in range(3):
            out = engine(*micro_batch(number, 0, dist.get_rank(), 2))
            engine.backward(out["loss"] + out["features"].square().mean())
            engine.step()
        results.append((out["loss"].item(), engine.module.batch_norm.running_mean.clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    return results[1]


def test_buffers_and_several_outputs(ranks):
    (loss, mean), _ = ranks(2).run(batch_norm_model)
    assert 0 < loss < 10 and mean.abs().max() > 0


def compiled_blocks(in_place: bool) -> None:
    plain, ours = (started(stage=stage, model=compiled(in_place)) for stage in (2, 3))
    for number in range(3):
        assert step(plain, number) == step(ours, number)


def compiled(in_place: bool) -> nn.Module:
    model = make("plain")
    for index, block in enumerate(model.blocks):
        if in_place:
            block.compile(backend="aot_eager")
        else:
            model.blocks[index] = torch.compile(block, backend="aot_eager")
    return model


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_blocks(ranks, in_place):
    ranks(2).run(compiled_blocks, in_place)


# ---- scripts --------------------------------------------------------------------------------------------
def unusual_script(stage: int) -> list[float]:
    """Two forwards before one backward, evaluation between steps and inside an accumulation, a part of the model by
    itself, gradient hooks."""
    engine = started(stage=stage)
    rank, world = dist.get_rank(), dist.get_world_size()
    seen = []
    hooked = next(engine.module.blocks[0].parameters())
    hooked.register_hook(lambda grad: seen.append(grad.sum().item()))
    figures = []
    for number in range(4):
        loss = engine(*micro_batch(number, 0, rank, world)) + engine(*micro_batch(number, 1, rank, world))
        with torch.no_grad():
            figures.append(engine(*micro_batch(99, 0, rank, world)).item())
        engine.backward(loss)
        engine.step()
        engine.eval()
        with torch.no_grad():
            figures.append(engine.module(*micro_batch(98, 0, rank, world)).item())
            figures.append(engine.module.blocks[1](torch.ones(1, 1, 13)).sum().item())
        engine.train()
        figures.append(loss.item())
    assert len(seen) == 4
    return figures + seen


def test_unusual_scripts_get_the_same(ranks):
    second, third = (ranks(2).run(unusual_script, stage) for stage in (2, 3))
    assert second == third


# ---- memory ---------------------------------------------------------------------------------------------
def held_while_used() -> None:
    engine = started()
    parts = [engine.module.embedding, *engine.module.blocks, engine.module.norm]
    live: list[int] = []
    for part in parts:
        part.register_forward_hook(
            lambda *_: live.append(
                sum(unit.sharded[0].is_unsharded for unit in engine.state.units if not unit.keep_unsharded)
            )
        )
    for number in range(3):
        step(engine, number)
    assert max(live) <= 2, live
    largest = sorted(
        (flat.layout.numel for u in engine.state.units if not u.keep_unsharded for flat in u.sharded), reverse=True
    )
    root = sum(flat.layout.numel for unit in engine.state.units if unit.keep_unsharded for flat in unit.sharded)
    peak, bound = (
        engine.state.ledger.peaks()["communication"],
        4 * 2 * (sum(largest[:2]) + root),
    )  # gathers, and reductions
    assert peak <= bound, (peak, bound, largest, root)
    assert engine.state.ledger.totals()["parameters"] == sum(
        4 * f.param_shard.numel() for u in engine.state.units for f in u.flats
    )


def test_two_units_at_a_time(ranks):
    ranks(2).run(held_while_used)


# ---- the whole model ------------------------------------------------------------------------------------
def ask_and_change(stage: int, precision: str) -> None:
    engine = started(stage=stage, precision=precision)
    expected = make("plain").state_dict()
    whole = engine.module.state_dict()
    assert whole.keys() == expected.keys()
    for name, value in whole.items():
        assert torch.equal(value.float(), expected[name].to(value.dtype).float()), name
    weight = engine.module.head.weight
    with zero.GatheredParameters([weight], modifier_rank=1), torch.no_grad():
        if dist.get_rank() == 1:
            weight.fill_(0.25)
    with zero.GatheredParameters(weight), torch.no_grad():
        engine(*micro_batch(0, 0, 0, 1))  # what was asked for stays, whatever else is used
        assert (weight == 0.25).all()
    # A master that 16 bits round to 0.25 already counts as unchanged, and keeps its digits.
    assert (masters_of(engine, "head.weight").to(weight.dtype) == 0.25).all()
    step(engine, 0)
    before = [flat.masters.clone() for flat in engine.state.flats]
    with zero.GatheredParameters(engine.module, modifier_rank=0):
        pass
    engine.module.load_state_dict(engine.module.state_dict())
    for flat, masters in zip(engine.state.flats, before, strict=True):
        assert torch.equal(flat.masters, masters)  # nothing changed, nothing rounded
    changed = {name: torch.full_like(value, 0.5) for name, value in engine.module.state_dict().items()}
    engine.module.load_state_dict(changed)
    assert (masters_of(engine, "head.weight").to(weight.dtype) == 0.5).all()
    assert all((value == 0.5).all() for value in engine.module.state_dict().values())
    assert step(engine, 1) > 0


def masters_of(engine: Any, name: str) -> torch.Tensor:
    for flat in engine.state.flats:
        for part in flat.layout.slices(flat.start, flat.end):
            if part.name == name:
                return flat.masters[part.shard_start : part.shard_start + part.numel]
    return torch.tensor([0.25 if name else 0.0])[:0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_state_dict_and_gathered_parameters(ranks, stage, precision):
    ranks(2).run(ask_and_change, stage, precision)


def write_where_nobody_keeps_it(stage: int) -> tuple[list[str], float]:
    """The warnings, and what the weight is afterwards."""
    engine = started(stage=stage)
    weight = engine.module.head.weight
    with warnings_of_engine() as said:
        with zero.GatheredParameters(engine.module):
            engine.module.load_state_dict(engine.module.state_dict())  # keeps what it writes
        assert not said
        for value in (0.5, 0.75):
            with zero.GatheredParameters([weight]), torch.no_grad():
                weight.fill_(value)
    return said, float(engine.module.state_dict()["head.weight"].max())


def test_a_change_that_gathered_parameters_does_not_keep_is_said_once(ranks):
    for said, value in ranks(2).run(write_where_nobody_keeps_it, 3):
        assert len(said) == 1 and "head.weight" in said[0] and "modifier_rank=0" in said[0] and value < 0.5
    for said, value in ranks(2).run(write_where_nobody_keeps_it, 2):
        assert not said and value == 0.75, "parameters that are not sharded keep what a script writes"


def another_engine_takes_over() -> tuple[dict[str, torch.Tensor], float]:
    model = make("plain")
    first = started(model=model)
    step(first, 0)
    second = started(model=model, stage=2)
    loss = step(second, 1)
    return {name: value.clone() for name, value in model.state_dict().items()}, loss


def test_another_engine_on_the_same_model(ranks):
    for whole, loss in ranks(2).run(another_engine_takes_over):
        assert 0 < loss < 10 and not any(value.isnan().any() for value in whole.values())


def backward_of_nothing() -> str:
    engine = started()
    with pytest.raises(RuntimeError, match="no trained parameter received a gradient") as caught:
        engine.backward(torch.ones((), requires_grad=True) * 2)
    return str(caught.value)


def test_a_backward_that_reaches_no_unit(ranks):
    assert all("must come from this engine's model" in text for text in ranks(2).run(backward_of_nothing))


def small_ones_stay() -> None:
    settings = config(3, 1, clip=0.0)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    engine = initialize(model=Uneven(), config=settings)[0]
    resharded = {name for name, p in engine.module.named_parameters() if type(p) is not nn.Parameter}
    assert "norm.weight" not in resharded and "head.weight" in resharded  # 13 and 481 elements
    assert next(unit.name for unit in engine.state.units) == "small"


def test_small_parameters_stay_whole(ranks):
    ranks(2).run(small_ones_stay)


def test_large_and_small_parameters_train_alike(ranks):
    settings = config(3, 2, clip=0.5)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    plain = train_plainly("plain", 2, 2, clip=0.5)
    for ours, _, _ in ranks(2).run(train_with_engine, "plain", settings):
        assert_equal(ours, plain)


# ---- parts of the model, copies, ways that differ -------------------------------------------------------
def parts_of_a_model(precision: str) -> None:
    engine = started(precision=precision)
    step(engine, 0)
    head = engine.module.head
    state = head.state_dict()
    assert not any(value.isnan().any() for value in state.values())
    head.load_state_dict({name: torch.full_like(value, 0.5) for name, value in state.items()})
    whole = engine.module.state_dict()
    assert (whole["head.weight"] == 0.5).all() and not any(value.isnan().any() for value in whole.values())
    step(engine, 1)
    assert (engine.module.state_dict()["head.weight"].float() - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_dicts_of_parts(ranks, precision):
    ranks(2).run(parts_of_a_model, precision)


def copied_and_pickled(stage: int) -> None:
    engine = started(stage=stage)
    step(engine, 0)
    with zero.GatheredParameters(engine.module):
        average = copy.deepcopy(engine.module)
        file = io.BytesIO()
        torch.save(engine.module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = {name: value.clone() for name, value in engine.module.state_dict().items()}
    inputs = micro_batch(5, 0, 0, 1)
    with torch.no_grad():
        loss = engine.module(*inputs)
    for plain in (average, loaded):
        assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())
        assert all(type(parameter) is nn.Parameter for parameter in plain.parameters())
        torch.testing.assert_close(plain(*inputs), loss)
    step(engine, 1)
    assert all(torch.equal(value, expected[name]) for name, value in average.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_copies_and_pickles_of_the_module_are_plain_modules(ranks, stage):
    ranks(2).run(copied_and_pickled, stage)


class Crossed(Uneven):
    order = (0, 1, 2)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for index in self.order:
            x = self.blocks[index](x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


def other_ways(shared: bool, evaluate: bool) -> str:
    os.environ[SHARED_MEMORY_VARIABLE] = "1" if shared else "0"
    try:
        engine = started(model=Crossed())
    finally:
        del os.environ[SHARED_MEMORY_VARIABLE]
    engine.module.order = ((0, 1, 2), (0, 2, 1))[dist.get_rank()]
    with pytest.raises(RuntimeError) as caught:
        if evaluate:
            with torch.no_grad():
                engine(*micro_batch(0, 0, 0, 1))
            engine.module.order = (0, 1, 2)
        step(engine, 1)
    return str(caught.value)


@pytest.mark.parametrize(("shared", "evaluate"), [(True, True), (True, False), (False, True)])
def test_ranks_that_take_different_ways_are_told(ranks, shared, evaluate):
    group = ranks(2)
    try:
        texts = group.run(other_ways, shared, evaluate)
    finally:
        group.broken = True
    for text in texts:
        if shared:
            assert "blocks.1/float32" in text and "blocks.2/float32" in text
        else:
            assert "ran modules in different orders" in text


def given_up(stage: int) -> list[str]:
    """A forward that raises in the middle; training goes on as if it had not been."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("runtime.engine").addHandler(handler)
    engine = started(stage=stage)
    step(engine, 0)
    hook = engine.module.blocks[1].down.register_forward_hook(lambda *_given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine(*micro_batch(1, 0, dist.get_rank(), 2))
    hook.remove()
    losses = [step(engine, number) for number in range(1, 4)]
    logging.getLogger("runtime.engine").removeHandler(handler)
    return [*warnings, str(losses)]


def test_a_forward_that_was_given_up(ranks):
    assert ranks(2).run(given_up, 2) == ranks(2).run(given_up, 3)


def gradient_penalty(stage: int, hold: bool) -> float:
    engine = started(stage=stage)
    tokens, targets = micro_batch(0, 0, dist.get_rank(), 2)
    seen: list[torch.Tensor] = []
    engine.module.blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with zero.GatheredParameters(engine.module, enabled=hold):
        loss = engine(tokens, targets)
        (slope,) = torch.autograd.grad(loss, seen[0], create_graph=True)
        engine.backward(loss + slope.square().sum())
    engine.step()
    return engine.get_global_grad_norm()


def refused_penalty() -> str:
    with pytest.raises(RuntimeError, match="stage 3: backward used parameters of a unit") as caught:
        gradient_penalty(3, hold=False)
    return str(caught.value)


def test_a_backward_through_a_backward(ranks):
    group = ranks(2)
    assert group.run(gradient_penalty, 2, False) == group.run(gradient_penalty, 3, True)
    try:
        assert all("GatheredParameters" in text for text in group.run(refused_penalty))
    finally:
        group.broken = True
