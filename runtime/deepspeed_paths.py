"""Import hooks for DeepSpeed's module paths that are not files here, and messages for the parts that are missing.

`deepspeed.runtime.X` is `runtime.X`: the contents of DeepSpeed's package `runtime` are at the top of this one. So
`import runtime as deepspeed` serves `deepspeed.runtime.zero.GatheredParameters`, and `from runtime.runtime.engine
import DeepSpeedEngine` finds the same class as `from runtime.engine import ...`.

One finder implements all of it. It is first in sys.meta_path, because the finder for files would import modules below
runtime.runtime a second time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OPTIMIZER = "runtime.optim.optimizer:ZeroOptimizer"

ELSEWHERE: dict[str, dict[str, str]] = {
    "activation_checkpointing": {},
    "activation_checkpointing.checkpointing": {
        "checkpoint": "runtime.checkpointing:checkpoint",
        "configure": "runtime.checkpointing:configure",
        "is_configured": "runtime.checkpointing:is_configured",
        "non_reentrant_checkpoint": "runtime.checkpointing:checkpoint",
        "reset": "runtime.checkpointing:reset",
    },
    "base_optimizer": {"DeepSpeedOptimizer": OPTIMIZER, "ZeROOptimizer": OPTIMIZER},
    "bf16_optimizer": {"BF16_Optimizer": OPTIMIZER},
    "dataloader": {
        "DeepSpeedDataLoader": "runtime.data.loader:ResumableLoader",
        "RepeatingLoader": "runtime.utils.loading:RepeatingLoader",
    },
    "fp16": {},
    "fp16.loss_scaler": {
        "DynamicLossScaler": "runtime.state.loss_scale:DynamicScaler",
        "LossScaler": "runtime.state.loss_scale:FixedScaler",
    },
    "fp16.fused_optimizer": {"FP16_Optimizer": OPTIMIZER},
    "fp16.unfused_optimizer": {"FP16_UnfusedOptimizer": OPTIMIZER},
    "moe": {},
    "moe.utils": {
        name: f"runtime.utils.experts:{name}"
        for name in ("has_moe_layers", "is_moe_param", "split_params_into_different_moe_groups_for_optimizer")
    },
    "zero.stage_1_and_2": {"DeepSpeedZeroOptimizer": OPTIMIZER},
    "zero.stage3": {"DeepSpeedZeroOptimizer_Stage3": OPTIMIZER},
    "utils.init_on_device": {"OnDevice": "runtime.utils.loading:OnDevice"},
    "utils.timer": {
        name: f"runtime.engine.timers:{name}" for name in ("SynchronizedWallClockTimer", "ThroughputTimer")
    },
    "utils.logging": {"logger": "runtime.utils:logger", "log_dist": "runtime.utils:log_dist"},
}
"""Module path below this package -> its names and where they are defined. One class is the optimizer of every stage and
precision."""

_DATA_PARALLEL = "zerotop shards data-parallel training and has no"

ABSENT: dict[str, str] = {
    "autotuning": f"{_DATA_PARALLEL} autotuner; `zerotop plan` says what a config needs",
    "compression": f"{_DATA_PARALLEL} quantization or pruning of the model",
    "elasticity": f"{_DATA_PARALLEL} batch sizes that follow the number of ranks; torchrun is elastic",
    "hybrid_engine": f"{_DATA_PARALLEL} inference kernels",
    "inference": f"{_DATA_PARALLEL} inference engine",
    "init_inference": f"{_DATA_PARALLEL} inference engine",
    "linear": f"{_DATA_PARALLEL} quantized or sharded linear layers; peft's LoRA works at every stage",
    "domino": f"{_DATA_PARALLEL} tensor parallelism",
    "module_inject": f"{_DATA_PARALLEL} tensor parallelism or injected kernels",
    **dict.fromkeys(
        ("moe.experts", "moe.layer", "moe.mappings", "moe.sharded_moe"),
        f"{_DATA_PARALLEL} expert parallelism; experts are sharded as any other parameter",
    ),
    "PipelineEngine": f"{_DATA_PARALLEL} pipeline parallelism",
    "PipelineModule": f"{_DATA_PARALLEL} pipeline parallelism",
    "pipe": f"{_DATA_PARALLEL} pipeline parallelism",
    "profiling": f"{_DATA_PARALLEL} flops profiler; the screen shows times, memory and traffic",
    "sequence": f"{_DATA_PARALLEL} sequence parallelism",
    "sequence_parallel": f"{_DATA_PARALLEL} sequence parallelism",
    "tensor_parallel": f"{_DATA_PARALLEL} tensor parallelism",
    "tp_model_init": f"{_DATA_PARALLEL} tensor parallelism",
    "set_autotp_mode": f"{_DATA_PARALLEL} tensor parallelism",
    "fp16.onebit": f"{_DATA_PARALLEL} 1-bit optimizers",
    "ops.op_builder": f"{_DATA_PARALLEL} operators that are built at run time; `zerotop doctor` says what is built",
    "ops.sparse_attention": f"{_DATA_PARALLEL} sparse attention layers",
    "ops.transformer": f"{_DATA_PARALLEL} transformer layers of its own",
    "compiler": f"{_DATA_PARALLEL} compiler passes; torch.compile works, and engine.compile() calls it",
}
"""DeepSpeed name that is not available -> reason. A name covers everything below it."""


def why_absent(name: str) -> str | None:
    """Why the dotted name `name` below this package is not available; None if it is unknown."""
    parts = name.removeprefix("runtime.").split(".")
    for length in range(1, len(parts) + 1):
        if (reason := ABSENT.get(".".join(parts[:length]))) is not None:
            return f"deepspeed.{name}: {reason}"
    return None


def attribute_of(package: str, name: str, names: Mapping[str, str] | None = None) -> Any:
    """Lazy imports for a package's __getattr__. names: name -> module below the package, with ":NAME" if it has another
    name there. Other names are submodules.

    Raises AttributeError, with the reason if the name is in `ABSENT`.
    """
    if names is not None and name in names:
        module, _, attribute = names[name].partition(":")
        return getattr(importlib.import_module(f"{package}.{module}"), attribute or name)
    if name.startswith("__"):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise  # the module exists, but one of its own imports is missing
        below = f"{package}.{name}".removeprefix("runtime.")
        raise AttributeError(why_absent(below) or f"module {package!r} has no attribute {name!r}") from None


class DeepSpeedPaths(MetaPathFinder):
    """Finds the modules of `ELSEWHERE` and those below runtime.runtime; raises for those of `ABSENT` with the
    reason."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        top, _, name = fullname.partition(".")
        if top != "runtime" or not name:
            return None
        if name == "runtime" or name.startswith("runtime."):
            return same_module(fullname, "runtime" + name.removeprefix("runtime"))
        if name in ELSEWHERE:
            package = any(known.startswith(f"{name}.") for known in ELSEWHERE)
            return ModuleSpec(fullname, _Names(ELSEWHERE[name]), is_package=package)
        if (reason := why_absent(name)) is not None:
            raise ModuleNotFoundError(reason, name=fullname)
        return None


class AnotherName(MetaPathFinder):
    """Finds every module of this package below another top-level name, without a second copy."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See MetaPathFinder."""
        top, _, below = fullname.partition(".")
        if top != self._name or not below:
            return None
        if importlib.util.find_spec(f"runtime.{below}") is None:
            return None
        return same_module(fullname, f"runtime.{below}")


class _SameModule(Loader):
    """Loads an existing module under another path, without a second copy."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it


class _Names(Loader):
    """Loads a module whose names are defined elsewhere and imported on first use."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        names = self._names

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name not in names:
                return attribute_of(module.__name__, name)
            home, _, attribute = names[name].partition(":")
            return getattr(importlib.import_module(home), attribute)

        module.__getattr__ = find  # type: ignore[method-assign]


def same_module(fullname: str, stands_for: str) -> ModuleSpec:
    """The spec with which `fullname` imports the module `stands_for`."""
    return ModuleSpec(fullname, _SameModule(stands_for), is_package=True)


def answer_to(name: str) -> None:
    """Let `import NAME.x` import `runtime.x`."""
    sys.meta_path.insert(0, AnotherName(name))


def install() -> None:
    """Add the finder to sys.meta_path, once."""
    if not any(isinstance(finder, DeepSpeedPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeepSpeedPaths())
