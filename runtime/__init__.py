"""The ZeRO trainer, with DeepSpeed's calls: `import runtime as deepspeed` moves a script.

Nothing is imported until it is asked for: the monitor uses runtime.wire, runtime.config and runtime.plan without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import checkpointing, comm, lr_schedules, ops, utils, zero
    from runtime.api import add_config_arguments, init_distributed, initialize
    from runtime.engine import Engine
    from runtime.utils import log_dist, logger

_MODULES = ("checkpointing", "comm", "lr_schedules", "ops", "utils", "zero")
_FROM = {"Engine": "engine", "log_dist": "utils", "logger": "utils"}
"""Names that are elsewhere than in runtime.api."""

__all__ = [
    "Engine",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "init_distributed",
    "initialize",
    "log_dist",
    "logger",
    "lr_schedules",
    "ops",
    "utils",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("zerotop")
    if name in _MODULES:
        return importlib.import_module(f"runtime.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"runtime.{_FROM.get(name, 'api')}"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
