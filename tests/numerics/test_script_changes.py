"""What scripts do to a model between steps: changed parameters are what is trained on, and changed modules are an error
that names the new parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime import zero
from runtime.engine.initialize import initialize
from tests.numerics.models import batch, make
from tests.numerics.training import HYPER, config, message_of, micro_batch

LIMIT = 0.25  # exact in 16 bits, as the clamped reference needs


def clamp(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-LIMIT, LIMIT)


def clamp_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-LIMIT, LIMIT)


def swap_rows(model: nn.Module) -> None:
    model.embedding.weight.data.copy_(model.embedding.weight.data.flip(0))  # type: ignore[union-attr, operator]


def average(model: nn.Module) -> None:
    """Half of what it was at the start."""
    start = make("plain").state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.5).add_(start[name].to(parameter.dtype), alpha=0.5)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "clamp": clamp, "clamp .data": clamp_data, "swap rows": swap_rows, "average": average,
}  # fmt: skip


def plainly(how: str, steps: int) -> dict[str, torch.Tensor]:
    """16-bit computation with fp32 masters. What changed in 16 bits replaces the master, else the master stays."""
    masters, working = make("plain"), make("plain").bfloat16()
    update = torch.optim.AdamW(masters.parameters(), **HYPER)
    for step in range(steps):
        for rank in range(2):
            rows = [batch(step, sample) for sample in range(2 * rank, 2 * rank + 2)]
            (working(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])) / 2).backward()
        for master, parameter in zip(masters.parameters(), working.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        update.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), working.parameters(), strict=True):
                parameter.copy_(master)
            before = copy.deepcopy(working)
            CHANGES[how](working)
            for master, parameter, old in zip(
                masters.parameters(), working.parameters(), before.parameters(), strict=True
            ):
                master.copy_(torch.where(parameter == old, master, parameter.float()))
    return {name: p.detach() for name, p in masters.named_parameters()}


def train(how: str, stage: int, folder: str | None, offload: bool) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """This rank's pieces of the masters after some steps; with a folder, as a checkpoint brings them back."""
    settings = config(stage, 1, clip=0.0, precision="bf16")
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = initialize(model=make("plain"), config=settings)[0]
    for step in range(6):
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), 2)))
        engine.step()
        engine.synchronize()
        if stage < 3:
            CHANGES[how](engine.module)
        else:
            with zero.GatheredParameters(engine.module, modifier_rank=0):
                if dist.get_rank() == 0:
                    CHANGES[how](engine.module)
    if folder is not None:
        engine.save_checkpoint(folder)
        again = initialize(model=make("plain"), config=settings)[0]
        again.load_checkpoint(folder)
        engine = again
    engine.backward(engine(*micro_batch(6, 0, dist.get_rank(), 2)) * 0)
    with torch.no_grad():
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
    engine.step()  # takes the last change over, and changes nothing itself
    engine.synchronize()
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for flat in engine.state.flats:
        for part in flat.layout.slices(flat.start, flat.end):
            piece = flat.masters[part.shard_start : part.shard_start + part.numel]
            found.setdefault(part.name, []).append((part.param_start, piece.clone()))
    return found


def put_together(ranks_found: list[Any], stage: int) -> dict[str, torch.Tensor]:
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for found in ranks_found if stage else ranks_found[:1]:
        for name, parts in found.items():
            pieces.setdefault(name, []).extend(parts)
    return {name: torch.cat([p for _, p in sorted(parts, key=lambda part: part[0])]) for name, parts in pieces.items()}


@pytest.mark.parametrize("how", list(CHANGES))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_changed_parameters_are_what_is_trained_on(ranks, tmp_path, stage, how):
    plain = plainly(how, 6)
    folder = str(tmp_path) if how == "clamp .data" else None
    ours = put_together(ranks(2).run(train, how, stage, folder, how == "average"), stage)
    for name, master in plain.items():
        difference = (ours[name] - master.flatten()).abs().max().item()
        assert difference <= 1e-2, (name, difference)  # of 16-bit sums over ranks; a lost change is 0.1 and more


def change_too_early() -> str:
    settings = config(1, 1, clip=0.0, precision="bf16")
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    engine = initialize(model=make("plain"), config=settings)[0]

    def run() -> None:
        for step in range(6):
            engine.backward(engine(*micro_batch(step, 0, 0, 1)))
            engine.step()
            clamp(engine.module)

    return message_of(RuntimeError, run)


def test_a_change_that_an_update_under_way_would_overwrite_is_an_error(ranks):
    (message,) = ranks(1).run(change_too_early)
    assert "engine.synchronize()" in message and "still running" in message


# ---- modules ---------------------------------------------------------------------------------------------------------
def resize(model: Any) -> None:
    model.embedding = nn.Embedding(41, 13)


def replace(model: Any) -> None:
    model.blocks[1] = copy.deepcopy(make("plain").blocks[1])


def add(model: Any) -> None:
    model.blocks[0].adapter = nn.Linear(13, 2)


def swap_tensor(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.zeros(37, 13))


def change_modules(how: str, stage: int) -> str:
    engine = initialize(model=make("plain"), config=config(stage, 1, clip=0.0))[0]
    engine.backward(engine(*micro_batch(0, 0, 0, 1)))
    engine.step()
    {"resize": resize, "replace": replace, "add": add, "swap": swap_tensor}[how](engine.module)
    engine.backward(engine(*micro_batch(1, 0, 0, 1)))
    return message_of(RuntimeError, engine.step)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("resize", "embedding.weight [41, 13]"),
        ("replace", "blocks.1.norm.weight [13]"),
        ("add", "blocks.0.adapter.weight [2, 13]"),
        ("swap", "head.weight [37, 13]"),
    ],
)
def test_parameters_that_come_later_are_named(ranks, how, name, stage):
    for message in ranks(2).run(change_modules, how, stage):
        assert name in message and "after initialize()" in message


def harmless() -> int:
    engine = initialize(model=make("plain"), config=config(2, 1, clip=0.0))[0]
    engine.module.frozen = nn.Linear(3, 3).requires_grad_(False)
    engine.module.blocks[0].dropout = nn.Dropout(0.0)
    for step in range(2):
        engine.backward(engine(*micro_batch(step, 0, 0, 1)))
        engine.step()
    return engine.global_steps


def test_modules_without_trained_parameters_may_come(ranks):
    assert ranks(2).run(harmless) == [2, 2]
