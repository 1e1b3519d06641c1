"""Activation checkpointing with DeepSpeed's calls (`deepspeed.checkpointing`), on torch's own.

checkpoint(function, *args) runs `function` again in backward instead of keeping what it computed (arXiv 1604.06174). It
is torch's non-reentrant form: it works at every stage, with frozen inputs and with arguments that are no tensors.
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
    """checkpoint_in_cpu: what is kept for backward waits in host memory. deepspeed_config: a file or dictionary whose
    activation_checkpointing.cpu_checkpointing says the same. The others concern model parallelism and DeepSpeed's own
    buffers: accepted, and not needed."""
    global _configured, _on_cpu
    if checkpoint_in_cpu is None and deepspeed_config is not None:
        from runtime.config import load

        section = load(deepspeed_config).activation_checkpointing
        checkpoint_in_cpu = section is not None and section.cpu_checkpointing
    _configured, _on_cpu = True, bool(checkpoint_in_cpu)


def is_configured() -> bool:
    return _configured


def reset() -> None:
    """Back to the state before `configure`."""
    global _configured, _on_cpu
    _configured = _on_cpu = False


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), whose activations are computed again in backward."""
    return keep_inputs_only(function, *args, on_cpu=_on_cpu)


def keep_inputs_only(function: Callable[..., Any], *args: Any, on_cpu: bool) -> Any:
    """`checkpoint` without what `configure` said. on_cpu: GPU inputs are moved to pinned host memory meanwhile."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    moves = on_cpu and any(tensor.device.type != "cpu" for tensor in tensors)
    place: AbstractContextManager[Any] = torch.autograd.graph.save_on_cpu(pin_memory=True) if moves else nullcontext()
    with place:
        return torch_checkpoint(function, *args, use_reentrant=False)
