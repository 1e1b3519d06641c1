"""What forward and backward are called with: the tokens of a micro-batch, and a loss described for an error message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def count_tokens(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> int:
    """Number of tokens in a micro-batch: elements of input_ids, else of the first 2-D integer tensor, else 0."""
    candidates: Iterable[Any] = [named["input_ids"]] if "input_ids" in named else [*inputs, *named.values()]
    for value in candidates:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point():
            return math.prod(value.shape)
    return 0


def describe(value: Any) -> str:
    """`value` in an error message: a tensor's shape, or the type of anything else."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
    return type(value).__name__
