"""Reads a DeepSpeed-style JSON config and resolves it to the complete settings of a run. Torch-free.

    config = load("config.json", ["zerotop.train.steps=50"])   # ConfigError lists every mistake at once
    resolved = config.resolve(world_size=2, device="cpu")      # batch arithmetic, "auto", precision

Files, in the order of their dependencies: errors · section · deepspeed, finetune, outputs, zerotop, optimizers,
schedulers (the sections, one docstring per key) · output_checks (what of the outputs can't be used together) ·
deepspeed_keys (DeepSpeed's other keys) · source (text, lines, --set) · keys (selects them) · batch · resolved ·
config · loading; supported (settings that the trainer refuses); files (globs) stands by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import DEFAULT_MICRO_BATCH
    from .config import Config, Device
    from .deepspeed import DType
    from .errors import ConfigError
    from .files import expand_files
    from .finetune import DataConfig, EvaluationConfig, LoraConfig, ModelConfig
    from .loading import load
    from .optimizers import OptimizerConfig
    from .resolved import Fp16Config, OffloadOptimizerConfig, OffloadParamConfig, Resolved
    from .schedulers import LRRangeTest, OneCycle, SchedulerConfig, WarmupCosineLR, WarmupDecayLR, WarmupLR
    from .supported import ADAM, bf16_states_need_adam, refuse_unsupported
    from .zerotop import (
        CheckpointConfig,
        LogConfig,
        TelemetryConfig,
        TrainConfig,
        ZerotopConfig,
    )

__all__ = [
    "ADAM",
    "DEFAULT_MICRO_BATCH",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DType",
    "DataConfig",
    "Device",
    "EvaluationConfig",
    "Fp16Config",
    "LRRangeTest",
    "LogConfig",
    "LoraConfig",
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
    "bf16_states_need_adam",
    "expand_files",
    "load",
    "refuse_unsupported",
]

_MODULES = {
    "ADAM": "supported",
    "CheckpointConfig": "zerotop",
    "Config": "config",
    "ConfigError": "errors",
    "DEFAULT_MICRO_BATCH": "batch",
    "DType": "deepspeed",
    "DataConfig": "finetune",
    "Device": "config",
    "EvaluationConfig": "finetune",
    "Fp16Config": "resolved",
    "LRRangeTest": "schedulers",
    "LogConfig": "zerotop",
    "LoraConfig": "finetune",
    "ModelConfig": "finetune",
    "OffloadOptimizerConfig": "resolved",
    "OffloadParamConfig": "resolved",
    "OneCycle": "schedulers",
    "OptimizerConfig": "optimizers",
    "Resolved": "resolved",
    "SchedulerConfig": "schedulers",
    "TelemetryConfig": "zerotop",
    "TrainConfig": "zerotop",
    "WarmupCosineLR": "schedulers",
    "WarmupDecayLR": "schedulers",
    "WarmupLR": "schedulers",
    "ZerotopConfig": "zerotop",
    "bf16_states_need_adam": "supported",
    "expand_files": "files",
    "load": "loading",
    "refuse_unsupported": "supported",
}
"""Name -> the file that has it, imported on first use: a screen needs only knobs.py, and the others take longer than
its first paint should."""
_OPTIMIZERS = ("ADAGRAD", "ADAM", "ADAMW", "LAMB", "LION", "MUON", "ONEBIT_ADAM", "ONEBIT_LAMB", "SGD")
"""DeepSpeed's constants ADAM_OPTIMIZER = "adam" and so on, by which scripts compare engine.optimizer_name()."""


def __getattr__(name: str) -> Any:
    """What `__all__` names, and names of DeepSpeed's module `runtime.config`, of which DeepSpeedConfig needs torch."""
    if name in _MODULES:
        found = getattr(importlib.import_module(f"runtime.config.{_MODULES[name]}"), name)
        globals()[name] = found
        return found
    if name == "DeepSpeedConfig":
        return importlib.import_module("runtime.engine.deepspeed_config").DeepSpeedConfig
    if name == "DeepSpeedConfigError":
        return importlib.import_module("runtime.config.errors").ConfigError
    if (kind := name.removesuffix("_OPTIMIZER")) != name and kind in _OPTIMIZERS:
        return kind.replace("_", "").lower()
    raise AttributeError(f"module 'runtime.config' has no attribute {name!r}")
