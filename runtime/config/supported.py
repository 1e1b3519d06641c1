"""Refuses valid settings that this version does not implement yet, rather than train something else."""

from __future__ import annotations

from .errors import ConfigError
from .resolved import Resolved


def refuse_unsupported(config: Resolved) -> None:
    """Raise ConfigError for all settings that are not implemented; called at launch and by initialize()."""
    problems = []
    if config.zerotop.model.path is not None:
        problems.append(
            "zerotop.model.path: Hugging Face models are not supported by the built-in trainer yet; use "
            "zerotop.model.preset, or a script of your own: zerotop launch CONFIG -- SCRIPT.py"
        )
    if problems:
        raise ConfigError(problems)
