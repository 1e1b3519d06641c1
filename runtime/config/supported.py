"""Refuses valid settings that this version does not implement yet, rather than train something else."""

from __future__ import annotations

from .errors import ConfigError
from .resolved import Resolved


def refuse_unsupported(config: Resolved) -> None:
    """Raise ConfigError for all settings that are not implemented; called at launch and by initialize()."""
    if config.zerotop.optimizer_state_dtype != "fp32":
        raise ConfigError('zerotop.optimizer_state_dtype: only "fp32" is supported')
