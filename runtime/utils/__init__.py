"""`deepspeed.utils`: the part that training scripts use. `logger` and `log_dist` are here (the screen shows their
records), the rest is in the modules of this package."""

from __future__ import annotations

# Not `import logging`: that name is the module deepspeed.utils.logging here.
from collections.abc import Sequence
from logging import INFO, Logger, getLevelNamesMapping, getLogger
from typing import Any

import torch.distributed as dist

from runtime.deepspeed_paths import attribute_of

logger = getLogger("runtime.script")

_FROM = {
    "OnDevice": "loading",
    "RepeatingLoader": "loading",
    "move_to_device": "loading",
    "clip_grad_norm_": "training",
    "see_memory_usage": "memory",
    "set_random_seed": "training",
    **dict.fromkeys(
        (
            "get_z3_leaf_modules",
            "set_z3_leaf_module",
            "set_z3_leaf_modules",
            "set_z3_leaf_modules_by_name",
            "set_z3_leaf_modules_by_suffix",
            "unset_z3_leaf_modules",
            "z3_leaf_module",
            "z3_leaf_parameter",
        ),
        "leaf_modules",
    ),
    **dict.fromkeys(
        (
            "safe_get_full_fp32_param",
            "safe_get_full_grad",
            "safe_get_full_optimizer_state",
            "safe_get_local_fp32_param",
            "safe_get_local_grad",
            "safe_get_local_optimizer_state",
            "safe_set_full_fp32_param",
            "safe_set_full_grad",
            "safe_set_full_optimizer_state",
            "safe_set_local_fp32_param",
            "safe_set_local_grad",
            "safe_set_local_optimizer_state",
            "safe_update_full_grad_vectorized",
        ),
        "tensor_fragment",
    ),
}
"""Name -> module of this package that defines it."""


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = INFO) -> None:
    """Log on the given ranks only; ranks=[-1]: on all. Without `ranks`, only outside a process group, as in
    DeepSpeed."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    chosen = list(ranks or [])
    if rank == -1 or (chosen and (chosen[0] == -1 or rank in chosen)):
        logger.log(level, f"[Rank {rank}] {message}")


def set_log_level_from_string(log_level_str: str, custom_logger: Logger | None = None) -> None:
    """Set the level of a logger (default: `logger`) to debug, info, warning, error or critical."""
    level = getLevelNamesMapping().get(log_level_str.upper())
    if level is None:
        raise ValueError(f"log level {log_level_str!r}: expected debug, info, warning, error or critical")
    (custom_logger or logger).setLevel(level)


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.utils", name, _FROM)
