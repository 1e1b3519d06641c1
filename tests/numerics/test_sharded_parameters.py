"""Stage 3: a parameter that is reached by a way no hook sees gives stage 2's numbers, or an error that names it; never
values that are not there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime import zero
from runtime.engine.initialize import initialize
from tests.numerics.models import Uneven, make
from tests.numerics.training import config, message_of, micro_batch


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Reaching(Uneven):
    """Computes the logits by `logits(x)`, which reaches the head's weight in some way, never by calling the head."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    targets_inside = True

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.hidden(tokens)
        return cross_entropy(self.logits(x), targets) if self.targets_inside else x


class FusedLoss(torch.autograd.Function):
    """As fused linear cross-entropy kernels do: forward computes the gradients, without grad mode."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x_, weight_ = x.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = cross_entropy(x_ @ weight_.t(), targets)
            ctx.save_for_backward(*torch.autograd.grad(loss, (x_, weight_)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * grads[0], ctx.saved_tensors[1] * grads[0], None


def reach(model: Reaching, how: str) -> None:
    head = model.head
    if how in ("attribute", "compiled"):
        model.logits = lambda x: F.linear(x, head.weight, head.bias)
    elif how == "closure":
        weight, bias = head.weight, head.bias
        model.logits = lambda x: F.linear(x, weight, bias)
    elif how == "another module's list":
        model.__dict__["others"] = [head.weight, head.bias]
        model.logits = lambda x: F.linear(x, *model.__dict__["others"])
    elif how == "functional call":
        model.logits = lambda x: torch.func.functional_call(head, dict(head.named_parameters()), (x,))
    elif how == "data":
        model.logits = lambda x: F.linear(x, head.weight.data, head.bias)
    elif how == "before its module":
        model.logits = lambda x: head(x * head.weight.mean())
    elif how == "a block's, transposed":
        model.logits = lambda x: head(x @ model.blocks[1].down.weight @ model.blocks[1].down.weight.t())


WAYS = ["attribute", "closure", "another module's list", "functional call", "data", "before its module"]
WAYS += [
    "a block's, transposed",
    "after the forward",
    "fused",
    "fused after the forward",
    "tied, transposed",
    "compiled",
]


def losses_of(how: str, stage: int, precision: str) -> list[float]:
    model = Reaching()
    reach(model, how)
    head, rank = model.head, dist.get_rank()
    if how == "tied, transposed":
        head.weight = model.embedding.weight = nn.Parameter(torch.randn(37, 13) / 4)
        model.logits = lambda x: x @ model.embedding.weight.t()
    model.targets_inside = "after" not in how and how != "fused"
    after = {
        "after the forward": lambda x, y: cross_entropy(F.linear(x, head.weight, head.bias), y),
        "fused": lambda x, y: FusedLoss.apply(x, head.weight, y),
        "fused after the forward": lambda x, y: FusedLoss.apply(x, head.weight, y),
    }
    whole = torch.compile(model, backend="eager") if how == "compiled" else model
    engine = initialize(model=whole, config=config(stage, 2, clip=0.5, precision=precision))[0]
    found = []
    for number in range(4):
        for micro in range(2):
            tokens, targets = micro_batch(number, micro, rank, 2)
            loss = engine(tokens, targets)
            if not model.targets_inside:
                loss = after[how](loss, targets)
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        with torch.no_grad():
            out = engine(*micro_batch(50, 0, rank, 2))
            found.append(float((out if model.targets_inside else after[how](out, targets)).detach()))
    assert engine.skipped_steps == 0
    return found


@pytest.mark.parametrize("how", WAYS)
def test_whatever_way_a_parameter_is_reached_the_numbers_are_stage_2s(ranks, how):
    for precision in ("fp32", "bf16") if how in ("attribute", "closure") else ("fp32",):
        second, third = (ranks(2).run(losses_of, how, stage, precision) for stage in (2, 3))
        assert second == third


# ---- between two passes ----------------------------------------------------------------------------------------------
def sharded_engine(precision: str = "fp32") -> Any:
    return initialize(model=make("plain"), config=config(3, 1, clip=0.0, precision=precision))[0]


def step(engine: Any, number: int) -> float:
    loss = engine(*micro_batch(number, 0, dist.get_rank(), 2))
    engine.backward(loss)
    engine.step()
    return loss.item()


def between_passes() -> list[str]:
    engine = sharded_engine()
    step(engine, 0)
    model, weight = engine.module, engine.module.head.weight
    assert weight.shape == weight.data.shape == (37, 13) and weight.numel() == weight.detach().numel() == 481
    assert weight.dtype == weight.data.dtype == torch.float32 and weight.device == weight.data.device
    assert (
        isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf and "head.weight" in repr(weight)
    )
    assert any(weight is p for group in engine.optimizer.param_groups for p in group["params"])
    assert weight.to("cpu") is weight and model.to("cpu") is model and model.cpu() is model
    assert all(p.data_ptr() == p.untyped_storage().data_ptr() for p in model.parameters())  # how tied ones are found
    errors = [
        message_of(RuntimeError, lambda: weight.norm()),
        message_of(RuntimeError, lambda: weight.data.norm()),
        message_of(RuntimeError, lambda: weight.detach() + 1),
        message_of(RuntimeError, lambda: weight.data.clamp_(-1, 1)),
        message_of(RuntimeError, lambda: torch._foreach_norm([weight])),
        message_of(RuntimeError, lambda: copy.deepcopy(weight)),
        message_of(RuntimeError, lambda: model.float().half()),
    ]
    with torch.no_grad():
        errors.append(message_of(RuntimeError, lambda: weight.mul_(2)))
    with zero.GatheredParameters(weight):
        assert type(weight) is nn.Parameter and weight.isfinite().all() and weight.data.norm() > 0
    assert step(engine, 1) > 0 and engine.skipped_steps == 0
    return errors


def test_between_two_passes_reading_a_parameter_is_an_error_that_names_it(ranks):
    for errors in ranks(2).run(between_passes):
        assert all("head.weight" in error and "GatheredParameters" in error for error in errors if "half" not in error)
        (converting,) = (error for error in errors if "half" in error)
        assert "before initialize()" in converting


def rank_0_logs_alone() -> bool:
    """Reading it in a pass would be a gather that the other rank does not join; between passes it is an error there."""
    engine = sharded_engine()
    step(engine, 0)
    if dist.get_rank() == 0:
        message_of(RuntimeError, lambda: engine.module.head.weight.norm())
    return step(engine, 1) > 0


def test_a_rank_that_reads_alone_between_passes_does_not_hang_the_others(ranks):
    assert ranks(2).run(rank_0_logs_alone) == [True, True]


# ---- ranks that evaluate differently ---------------------------------------------------------------------------------
def evaluate_unevenly(gathered: bool) -> str:
    engine = sharded_engine()
    step(engine, 0)
    rank = dist.get_rank()
    with zero.GatheredParameters(engine.module) if gathered else nullcontext(), torch.no_grad():
        for _ in range(2):
            engine(*micro_batch(60, 0, rank, 2))
        if rank == 1 and gathered:
            engine(*micro_batch(60, 0, rank, 2))
        elif rank == 1:
            return message_of(RuntimeError, lambda: engine(*micro_batch(60, 0, rank, 2)))
    return str(step(engine, 1)) if gathered else message_of(RuntimeError, lambda: step(engine, 1))


def test_ranks_that_evaluate_different_numbers_of_batches_are_told_at_once(ranks):
    group = ranks(2)
    for text in group.run(evaluate_unevenly, False):
        assert "rank 1 begins another forward without gradients, but rank 0 has gone on to training" in text
    group.broken = True


def test_inside_gathered_parameters_they_may(ranks):
    assert all(float(text) > 0 for text in ranks(2).run(evaluate_unevenly, True))


# ---- NumPy arrays of parameters --------------------------------------------------------------------------------------
def losses_with_arrays(stage: int) -> tuple[list[float], bool]:
    """Losses of a script that takes arrays of a weight inside GatheredParameters and in a forward hook, and whether
    the arrays still have the values they were taken with."""
    engine = initialize(model=make("plain"), config=config(stage, 1, clip=0.0))[0]
    losses = [step(engine, 0)]
    weight, arrays = engine.module.head.weight, []

    def take(*_: Any) -> None:
        array = weight.detach().numpy()
        arrays.append((array, array.copy()))

    with zero.GatheredParameters(weight):
        take()
    losses.append(step(engine, 1))
    engine.module.head.register_forward_hook(take)
    losses += [step(engine, number) for number in (2, 3)]
    return losses, stage != 3 or all((array == copied).all() for array, copied in arrays)


def test_numpy_arrays_of_parameters_keep_their_memory_and_training_goes_on(ranks):
    second, third = (ranks(2).run(losses_with_arrays, stage) for stage in (2, 3))
    assert second == third and all(kept for _, kept in third)
