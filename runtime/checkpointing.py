"""Activation checkpointing with DeepSpeed's API (`deepspeed.checkpointing`), implemented by torch's.

checkpoint(function, *args) recomputes `function` in backward instead of keeping its activations (arXiv 1604.06174). It
is torch's non-reentrant variant, which works at every stage, with frozen inputs and with arguments that are not
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

_configured = False
_on_cpu = False


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Configure `checkpoint`. checkpoint_in_cpu: keep the inputs for recomputation in host memory. deepspeed_config: a
    file or dictionary with activation_checkpointing.cpu_checkpointing as its default. Other arguments are ignored: they
    concern model parallelism and DeepSpeed's buffers."""
    global _configured, _on_cpu
    if checkpoint_in_cpu is None and deepspeed_config is not None:
        from runtime.config import load

        section = load(deepspeed_config).activation_checkpointing
        checkpoint_in_cpu = section is not None and section.cpu_checkpointing
    _configured, _on_cpu = True, bool(checkpoint_in_cpu)


def is_configured() -> bool:
    """Whether `configure` has been called."""
    return _configured


def reset() -> None:
    """Undo `configure`."""
    global _configured, _on_cpu
    _configured = _on_cpu = False


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Compute function(*args), recomputing its activations in backward."""
    return keep_inputs_only(function, *args, on_cpu=_on_cpu)


def keep_inputs_only(function: Callable[..., Any], *args: Any, on_cpu: bool) -> Any:
    """`checkpoint` independent of `configure`. on_cpu: keep GPU inputs in pinned host memory until backward."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    moves = on_cpu and any(tensor.device.type != "cpu" for tensor in tensors)
    place: AbstractContextManager[Any] = torch.autograd.graph.save_on_cpu(pin_memory=True) if moves else nullcontext()
    with place:
        return torch_checkpoint(function, *args, use_reentrant=False)
