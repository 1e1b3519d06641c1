"""Optimizers that are not torch.optim's: a script's own, a subclass with its own step(), one from a library.

A rank has flat shards and not full matrices, so an optimizer can be used if it treats every element by itself. This is
tested: a few steps on a matrix and on two flat pieces of it must give the same values.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from runtime.config import ConfigError

SHAPE = (6, 8)
"""Shape of the matrix that is tried."""
CUT = 20
"""Elements of its first flat piece."""
STEPS = 3


def torch_optimizer_name(optimizer: torch.optim.Optimizer) -> str | None:
    """Name of the torch.optim class whose step() `optimizer` uses; None if it has its own."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.split(".")[0] == "torch" and kind is not torch.optim.Optimizer:
            return kind.__name__ if _same_step(type(optimizer), kind) else None
    return None


def _same_step(kind: type[Any], base: type[Any]) -> bool:
    # torch wraps the step() of every class that is instantiated.
    made_of = ("step", "_init_group")  # torch's older optimizers have no _init_group
    return all(_plain(getattr(kind, name, None)) is _plain(getattr(base, name, None)) for name in made_of)


def _plain(function: Any) -> Any:
    return inspect.unwrap(function) if function is not None else None


def fresh_copy(given: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer like `given` before its first step, with other groups. It is copied, because the arguments of its
    constructor are not known."""
    made: torch.optim.Optimizer = object.__new__(type(given))
    made.__dict__.update({name: value for name, value in vars(given).items() if name != "step"})  # a scheduler wraps it
    made.state = defaultdict(dict)
    made.param_groups = [{**group, "params": list(group["params"])} for group in groups]
    return made


def check_elementwise(given: torch.optim.Optimizer) -> None:
    """Raises ConfigError if `given` trains flat shards differently from full matrices, or can't be tested."""
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator, device="cpu")
    gradients = [torch.randn(SHAPE, generator=generator, device="cpu") for _ in range(STEPS)]
    flat = [gradient.view(-1) for gradient in gradients]
    try:
        with torch.random.fork_rng(devices=[]):
            whole, states = _train(given, start, gradients)
            first, _ = _train(given, start.view(-1)[:CUT], [gradient[:CUT] for gradient in flat])
            second, _ = _train(given, start.view(-1)[CUT:], [gradient[CUT:] for gradient in flat])
    except Exception as error:  # whatever a foreign optimizer raises
        raise ConfigError(
            f"optimizer: {kind} failed on a flat shard ({type(error).__name__}: {error}); expected one that steps "
            "without a closure, on plain fp32 tensors"
        ) from error
    for name, value in states.items():
        if isinstance(value, torch.Tensor) and value.numel() != 1 and value.shape != whole.shape:
            raise ConfigError(
                f"optimizer: {kind} keeps a state {name} of shape {list(value.shape)} for a parameter of shape "
                f"{list(whole.shape)}; expected elementwise states, because a rank has flat shards"
            )
    if not torch.allclose(whole.view(-1), torch.cat([first, second]), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"optimizer: {kind} trains a matrix differently from flat pieces of it, so it needs full parameters; "
            "expected an elementwise optimizer, because a rank has flat shards"
        )


def _train(
    given: torch.optim.Optimizer, start: torch.Tensor, gradients: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Take a step with each of the gradients. Returns the parameter's values and its states."""
    parameter = nn.Parameter(start.clone())
    optimizer = fresh_copy(given, [{**given.param_groups[0], "params": [parameter]}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), dict(optimizer.state[parameter])
