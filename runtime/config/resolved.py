"""The complete settings of a run, with all defaults and "auto" values filled in, as engine and trainer use them."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from .deepspeed import ActivationCheckpointingSection, DType
from .errors import dotted
from .optimizers import OptimizerConfig
from .schedulers import SchedulerConfig
from .section import Section
from .zerotop import ZerotopConfig

_IN_FILE: dict[str, str] = {
    "micro_batch": "train_micro_batch_size_per_gpu",
    "accumulation": "gradient_accumulation_steps",
    "global_batch": "train_batch_size",
    "stage": "zero_optimization.stage",
    "precision": "bf16.enabled or fp16.enabled",
    "grad_accum_dtype": "data_types.grad_accum_dtype",
    "persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "optimizer.type": "optimizer.type",
    "optimizer.extra": "optimizer.params",
    "optimizer": "optimizer.params",
    "scheduler.type": "scheduler.type",
    "scheduler": "scheduler.params",
    "offload_optimizer": "zero_optimization.offload_optimizer",
    "offload_param": "zero_optimization.offload_param",
}
"""Setting of `Resolved` -> its key in the config file, where they differ. Longer paths first."""


def _leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> value, for every value in nested dictionaries."""
    if not isinstance(value, dict):
        return {path: value}
    return {where: leaf for key, item in value.items() for where, leaf in _leaves(item, (*path, key)).items()}


def _in_file(path: tuple[str, ...]) -> str:
    whole = dotted(path)
    for ours, theirs in _IN_FILE.items():
        if whole == ours or whole.startswith(f"{ours}."):
            return theirs + whole[len(ours) :]
    return whole


class Fp16Config(Section):
    """Loss scaling for fp16. `loss_scale` 0 is dynamic: it starts at 2**initial_scale_power."""

    loss_scale: float = 0.0
    """Factor on the loss; 0 is dynamic."""
    initial_scale_power: int = 16
    """The first dynamic scale is 2 to this power."""
    loss_scale_window: int = 1000
    """Optimizer steps without overflow after which a dynamic scale doubles."""
    hysteresis: int = 2
    """Overflows before a dynamic scale halves."""
    consecutive_hysteresis: bool = False
    """Whether a step without overflow refills the hysteresis."""
    min_loss_scale: float = 1.0
    """A dynamic scale never falls below this."""
    auto_cast: bool = False
    """Whether floating-point inputs of the model are cast to fp16."""

    @property
    def dynamic(self) -> bool:
        """Whether the loss scale is found while training."""
        return self.loss_scale == 0.0


class OffloadOptimizerConfig(Section):
    """Optimizer states in host memory."""

    device: Literal["cpu"] = "cpu"
    """Where they live."""
    pin_memory: bool = False
    """Whether that host memory is page-locked."""
    ratio: float = 1.0
    """Share of the states that goes to the host, 0 to 1."""


class OffloadParamConfig(Section):
    """Stage 3 parameters in host memory."""

    device: Literal["cpu"] = "cpu"
    """Where they live."""
    pin_memory: bool = False
    """Whether that host memory is page-locked."""


class Resolved(Section):
    """A complete config for a given number of ranks and kind of device."""

    world_size: int
    """Number of ranks."""
    device: Literal["cpu", "cuda"]
    """Kind of device that every rank trains on."""
    micro_batch: int
    """Samples per rank and micro-step."""
    accumulation: int
    """Micro-steps per optimizer step."""
    global_batch: int
    """Samples per optimizer step: micro_batch x accumulation x world_size."""
    stage: Literal[0, 1, 2, 3]
    """ZeRO stage."""
    precision: DType
    """Precision of parameters and activations; optimizer states and master weights are fp32."""
    grad_accum_dtype: DType
    """Precision in which gradients accumulate: fp32, or `precision` when the config says so."""
    communication_data_type: DType | None
    """Precision in which gradients are reduced. None: `precision` at stages 2 and 3, where gradients are reduced as
    each unit's backward ends, else `grad_accum_dtype`."""
    prescale_gradients: bool
    """Whether gradients are divided by the number of ranks before they are reduced, and not after."""
    gradient_predivide_factor: float
    """What gradients are divided by before they are reduced; the rest of the averaging follows after."""
    persistence_threshold: int
    """Parameters with fewer elements form a unit of their own, which is not sharded at stage 3."""
    activation_checkpointing: ActivationCheckpointingSection | None
    """None: the built-in model keeps its activations."""
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    """What the gradients of the ranks become."""
    managed_accumulation: bool = True
    """False: every engine.step() of a script ends an accumulation."""
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    """Lowest level of a script's own log records; None leaves it as it is."""
    tag_validation: Literal["ignore", "warn", "fail"] = "warn"
    """What save_checkpoint() does if ranks pass different tags."""
    gradient_clipping: float
    """Largest global gradient norm; 0 does not clip."""
    optimizer: OptimizerConfig | None
    """None only under a script whose config has no optimizer section: the script brings its own."""
    scheduler: SchedulerConfig | None
    """None: a constant learning rate, or the script's own scheduler."""
    fp16: Fp16Config
    """Loss scaling; it matters when precision is fp16."""
    offload_optimizer: OffloadOptimizerConfig | None
    """None: optimizer states stay on the training device."""
    offload_param: OffloadParamConfig | None
    """None: parameters stay on the training device. Only at stage 3."""
    dataloader_drop_last: bool
    """Whether a loader that initialize() builds from `training_data` leaves out an incomplete last batch."""
    zerotop: ZerotopConfig
    """zerotop's own section. Without a script, model.preset or model.path and train.steps are set."""
    notes: tuple[str, ...]
    """Keys without effect and why, and the defaults that were chosen: one line each, to be shown once at launch."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of DeepSpeed's. Scripts, such as transformers' Trainer, read `engine.config`, which is a
        dictionary there."""
        sections: dict[str, Any] = {
            "train_batch_size": self.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.gradient_clipping,
            "bf16": {"enabled": self.precision == "bf16"},
            "fp16": {**self.fp16.model_dump(mode="json"), "enabled": self.precision == "fp16"},
            "zero_optimization": {"stage": self.stage},
        }
        for name in ("offload_optimizer", "offload_param"):
            if (offload := getattr(self, name)) is not None:
                sections["zero_optimization"][name] = {"device": "cpu", **offload.model_dump(mode="json")}
        if self.optimizer is not None:
            sections["optimizer"] = {"type": self.optimizer.type, "params": self.optimizer.torch_kwargs()}
        for name in ("scheduler", "zerotop"):
            if (section := getattr(self, name)) is not None:
                sections[name] = section.model_dump(mode="json")
        return sections.get(key, default)

    def to_json(self) -> str:
        """This config as a JSON document; `from_json` reads it back equal."""
        return json.dumps(self.model_dump(mode="json"), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Resolved:
        """Read what `to_json` wrote. Raises pydantic's ValidationError when it is something else."""
        return cls.model_validate_json(text)

    def difference(self, other: Resolved) -> tuple[str, Any, Any] | None:
        """The first setting in which `other` differs: (key in the config file, own value, other value). Ignores
        notes."""
        mine, theirs = (_leaves(config.model_dump(mode="json", exclude={"notes"})) for config in (self, other))
        for path in [*mine, *(path for path in theirs if path not in mine)]:
            if mine.get(path) != theirs.get(path):
                return _in_file(path), mine.get(path), theirs.get(path)
        return None

    def digest(self) -> str:
        """12 hex digits that are equal for equal configs; notes do not count."""
        canonical = json.dumps(self.model_dump(mode="json", exclude={"notes"}), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]
