"""DeepSpeed-style JSON config -> validated, complete settings of a run. Torch-free.

    config = load("config.json", ["zerotop.train.steps=50"])   # ConfigError lists every mistake at once
    resolved = config.resolve(world_size=2, device="cpu")      # batch arithmetic, "auto", precision

Files, in the order in which they use each other: errors · section · deepspeed, zerotop, optimizers, schedulers (the
sections, one docstring per key) · known (DeepSpeed's other keys) · source (text, lines, --set) · sift (keys sorted) ·
batch · resolved · config · load; supported (what the trainer can't do yet); files (globs) stands by itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from .batch import DEFAULT_MICRO_BATCH
from .config import Config, Device
from .deepspeed import DType
from .errors import ConfigError
from .files import expand_files
from .load import load
from .optimizers import OptimizerConfig
from .resolved import Fp16Config, OffloadOptimizerConfig, OffloadParamConfig, Resolved
from .schedulers import LRRangeTest, OneCycle, SchedulerConfig, WarmupCosineLR, WarmupDecayLR, WarmupLR
from .supported import refuse_unsupported
from .zerotop import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    TelemetryConfig,
    TrainConfig,
    ZerotopConfig,
)

__all__ = [
    "DEFAULT_MICRO_BATCH",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DType",
    "DataConfig",
    "Device",
    "Fp16Config",
    "LRRangeTest",
    "LogConfig",
    "ModelConfig",
    "OffloadOptimizerConfig",
    "OffloadParamConfig",
    "OneCycle",
    "OptimizerConfig",
    "Resolved",
    "SchedulerConfig",
    "TelemetryConfig",
    "TrainConfig",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "ZerotopConfig",
    "expand_files",
    "load",
    "refuse_unsupported",
]


def __getattr__(name: str) -> Any:
    """DeepSpeed's names in its module `runtime.config`. The class asks torch for the number of ranks, so it is
    elsewhere, and loaded for who names it."""
    if name == "DeepSpeedConfig":
        return importlib.import_module("runtime.engine.deepspeed_config").DeepSpeedConfig
    if name == "DeepSpeedConfigError":
        return ConfigError
    raise AttributeError(f"module 'runtime.config' has no attribute {name!r}")
