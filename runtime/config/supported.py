"""What a config may say and this version's trainer cannot do yet: better no run than another one than was asked for."""

from __future__ import annotations

from .errors import ConfigError
from .resolved import Resolved


def refuse_unsupported(config: Resolved) -> None:
    """Raise ConfigError with every such setting at once. Launch asks before it starts anything, initialize() again."""
    problems = []
    if config.zerotop.model.path is not None:
        problems.append(
            "zerotop.model.path: Hugging Face models are not supported by the built-in trainer yet; use "
            "zerotop.model.preset, or a script of your own: zerotop launch CONFIG -- SCRIPT.py"
        )
    if problems:
        raise ConfigError(problems)
