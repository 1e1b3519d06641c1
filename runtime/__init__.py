"""The ZeRO trainer, with DeepSpeed's calls: `import runtime as deepspeed` moves a script.

Nothing is imported until it is asked for: the monitor uses runtime.wire, runtime.config and runtime.plan without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime import checkpointing, zero
    from runtime.api import add_config_arguments, init_distributed, initialize
    from runtime.engine import Engine

__all__ = ["Engine", "add_config_arguments", "checkpointing", "init_distributed", "initialize", "zero"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("zerotop")
    if name in ("zero", "checkpointing"):
        return importlib.import_module(f"runtime.{name}")
    if name in __all__:
        return getattr(importlib.import_module("runtime.engine" if name == "Engine" else "runtime.api"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
