"""The ZeRO trainer with DeepSpeed's API: `import runtime as deepspeed` ports a script.

Imports are lazy, because the monitor uses runtime.wire, runtime.config and runtime.plan without torch.

`__version__` is the DeepSpeed version whose API this package follows, for scripts that compare versions, with zerotop's
own version after the plus sign. `zerotop --version` prints only zerotop's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from runtime import deepspeed_paths as deepspeedpaths

if TYPE_CHECKING:
    from runtime import accelerator, checkpointing, comm, lr_schedules, ops, utils, zero
    from runtime.accelerator import get_accelerator
    from runtime.comm import init_distributed
    from runtime.config import ConfigError as DeepSpeedConfigError
    from runtime.engine import DeepSpeedEngine, Engine
    from runtime.engine.deepspeed_config import DeepSpeedConfig
    from runtime.engine.initialize import add_config_arguments, initialize
    from runtime.optim.optimizer import ZeroOptimizer as DeepSpeedOptimizer
    from runtime.utils import log_dist, logger
    from runtime.utils.loading import OnDevice

DEEPSPEED_VERSION = "0.19.6"
"""The DeepSpeed version whose sources and tests this package was compared with."""

_FROM = {
    "DeepSpeedConfig": "engine.deepspeed_config",
    "DeepSpeedConfigError": "config:ConfigError",
    "DeepSpeedEngine": "engine",
    "DeepSpeedOptimizer": "optim.optimizer:ZeroOptimizer",
    "Engine": "engine",
    "OnDevice": "utils.loading",
    "add_config_arguments": "engine.initialize",
    "get_accelerator": "accelerator",
    "init_distributed": "comm",
    "initialize": "engine.initialize",
    "log_dist": "utils",
    "logger": "utils",
}
"""Name -> module that defines it, with ":NAME" if it has another name there."""

_VERSION_PARTS = ("__version_major__", "__version_minor__", "__version_patch__")

__all__ = [
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DeepSpeedEngine",
    "DeepSpeedOptimizer",
    "Engine",
    "OnDevice",
    "accelerator",
    "add_config_arguments",
    "checkpointing",
    "comm",
    "get_accelerator",
    "init_distributed",
    "initialize",
    "log_dist",
    "logger",
    "lr_schedules",
    "ops",
    "utils",
    "zero",
]

deepspeedpaths.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return f"{DEEPSPEED_VERSION}+zerotop.{importlib.import_module('importlib.metadata').version('zerotop')}"
    if name in _VERSION_PARTS:
        return int(DEEPSPEED_VERSION.split(".")[_VERSION_PARTS.index(name)])
    if name in ("__git_hash__", "__git_branch__"):
        return None  # an installed package knows neither
    return deepspeedpaths.attribute_of("runtime", name, _FROM)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
