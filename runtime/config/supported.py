"""Refuses combinations of valid settings that are not implemented, rather than train something else."""

from __future__ import annotations

from .errors import ConfigError
from .resolved import Resolved

ADAM = ("Adam", "AdamW")


def refuse_unsupported(config: Resolved) -> None:
    """Raise ConfigError for settings that do not go together; called at launch and by initialize()."""
    if config.zerotop.optimizer_state_dtype == "fp32":
        return
    if config.optimizer is not None and config.optimizer.type not in ADAM:
        raise ConfigError(bf16_states_need_adam(config.optimizer.type))
    if config.offload_optimizer is not None and config.zerotop.offload.update == "gpu":
        raise ConfigError(
            'zerotop.optimizer_state_dtype: "bf16" states in host memory are updated by the CPU; set '
            'zerotop.offload.update to "cpu" or "auto", got "gpu"'
        )


def bf16_states_need_adam(optimizer: str) -> str:
    """What is wrong with bf16 states of another optimizer."""
    return f'zerotop.optimizer_state_dtype: "bf16" needs the optimizer AdamW or Adam, got {optimizer}; use "fp32"'
