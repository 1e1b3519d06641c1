"""Optimizers that are not torch.optim's: a script's own, a subclass with a step of its own, one from a library.

A rank holds flat shards and not whole matrices, so an optimizer fits when it treats every element by itself. That is
tried, not believed: a few steps on a matrix and on two flat pieces of it must come to the same values.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from runtime.config import ConfigError

SHAPE = (6, 8)
CUT = 20
STEPS = 3


def torchs_kind(optimizer: torch.optim.Optimizer) -> str | None:
    """The optimizer of torch.optim whose step this one takes; None where its step is its own."""
    for kind in type(optimizer).__mro__:
        if kind.__module__.split(".")[0] == "torch" and kind is not torch.optim.Optimizer:
            return kind.__name__ if _same_step(type(optimizer), kind) else None
    return None


def _same_step(kind: type[Any], base: type[Any]) -> bool:
    # torch wraps the step of every class that is instantiated.
    made_of = ("step", "_init_group")  # torch's older ones have no such second part
    return all(_plain(getattr(kind, name, None)) is _plain(getattr(base, name, None)) for name in made_of)


def _plain(function: Any) -> Any:
    return inspect.unwrap(function) if function is not None else None


def like(given: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer as `given` was when it was fresh, over other groups: its constructor's arguments nobody knows."""
    made: torch.optim.Optimizer = object.__new__(type(given))
    made.__dict__.update({name: value for name, value in vars(given).items() if name != "step"})  # a scheduler wraps it
    made.state = defaultdict(dict)
    made.param_groups = [{**group, "params": list(group["params"])} for group in groups]
    return made


def check_elementwise(given: torch.optim.Optimizer) -> None:
    """Raises ConfigError for an optimizer that trains flat shards differently, or can't be tried."""
    kind = f"{type(given).__module__}.{type(given).__qualname__}"
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)
    gradients = [torch.randn(SHAPE, generator=generator) for _ in range(STEPS)]
    flat = [gradient.view(-1) for gradient in gradients]
    try:
        with torch.random.fork_rng(devices=[]):
            whole, states = _trained(given, start, gradients)
            first, _ = _trained(given, start.view(-1)[:CUT], [gradient[:CUT] for gradient in flat])
            second, _ = _trained(given, start.view(-1)[CUT:], [gradient[CUT:] for gradient in flat])
    except Exception as error:  # whatever a foreign optimizer raises
        raise ConfigError(
            f"optimizer: {kind} can't be tried on shards ({type(error).__name__}: {error}); expected one that steps "
            "without a closure, on plain fp32 tensors"
        ) from error
    for name, value in states.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != whole.shape:
            raise ConfigError(
                f"optimizer: {kind} keeps a state {name} of shape {list(value.shape)} for a parameter of shape "
                f"{list(whole.shape)}; expected states of single elements, for a rank holds flat shards"
            )
    if not torch.allclose(whole.view(-1), torch.cat([first, second]), rtol=1e-5, atol=1e-7):
        raise ConfigError(
            f"optimizer: {kind} trains a matrix otherwise than flat pieces of it, so it needs whole parameters; "
            "expected one that treats every element by itself, for a rank holds flat shards"
        )


def _trained(
    given: torch.optim.Optimizer, start: torch.Tensor, gradients: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """After a step with each of the gradients: the values, and the states."""
    parameter = nn.Parameter(start.clone())
    optimizer = like(given, [{**given.param_groups[0], "params": [parameter]}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach(), dict(optimizer.state[parameter])
