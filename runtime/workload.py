"""From a resolved config to what runtime/plan.py plans for. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.data.vocab import count_tokens
from runtime.models.presets import GPTConfig, ModelError, load_model_config, unit_parameters
from runtime.plan import Workload

if TYPE_CHECKING:
    from runtime.config import Resolved

# fp32 state tensors per parameter; SGD and RMSprop depend on their settings.
_MOMENTS = {"Adagrad": 1, "ASGD": 1}


def workload_of(
    resolved: Resolved,
    name: str,
    units: Sequence[tuple[str, int]],
    shape: GPTConfig | None,
    world_size: int | None = None,
) -> Workload:
    """The workload of a config. units: (name, parameters) in forward order. shape: None where it isn't known.
    world_size: instead of the config's."""
    offload, checkpointing = resolved.offload_optimizer, resolved.activation_checkpointing
    segments = None
    if checkpointing is not None and shape is not None:
        segments = checkpointing.number_checkpoints or shape.layers
    return Workload(
        name=name,
        units=tuple(units),
        shape=shape,
        world_size=resolved.world_size if world_size is None else world_size,
        precision=resolved.precision,
        grad_accum_dtype=resolved.grad_accum_dtype,
        reduce_dtype=resolved.communication_data_type,
        moments=moments(resolved),
        micro_batch=resolved.micro_batch,
        accumulation=resolved.accumulation,
        seq_len=resolved.zerotop.data.seq_len,
        offload_ratio=offload.ratio if offload else 1.0,
        offload_parameters=resolved.offload_param is not None,
        pin_memory=offload.pin_memory if offload else True,
        segments=segments,
        checkpoints=bool(resolved.zerotop.checkpoint.interval or resolved.zerotop.checkpoint.minutes),
    )


def built_in_workload(resolved: Resolved, folder: Path) -> Workload | None:
    """Of the built-in trainer under this config, whose relative paths start in `folder`; None when its model or
    tokenizer can't be read from here."""
    section = resolved.zerotop.model
    try:
        tokens = count_tokens(resolved.zerotop.data.tokenizer, folder)
        shape = load_model_config(section, tokens, resolved.zerotop.data.seq_len)
    except (OSError, ValueError, ModelError):
        return None
    return workload_of(resolved, str(section.preset), unit_parameters(shape, resolved.persistence_threshold), shape)


def moments(resolved: Resolved) -> int:
    """fp32 state tensors per parameter that the optimizer keeps."""
    optimizer = resolved.optimizer
    if optimizer is None:
        return 2
    extra = optimizer.extra
    if optimizer.type == "SGD":
        return int(bool(extra.get("momentum")))
    if optimizer.type == "RMSprop":
        return 1 + bool(extra.get("momentum")) + bool(extra.get("centered"))
    return _MOMENTS.get(optimizer.type, 2)
