"""The sections and keys of DeepSpeed that zerotop implements; deepspeed_keys.py lists the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .section import Flag, Int, Num, Section, integer

DType = Literal["fp32", "bf16", "fp16"]

_DTYPES = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32",
    "bf16": "bf16", "bfp16": "bf16", "bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16",
}  # fmt: skip


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value.lower().removeprefix("torch."), value) if isinstance(value, str) else value


def _reduction(value: Any) -> Any:
    lowered = value.lower() if isinstance(value, str) else value
    return "mean" if lowered in ("avg", "average") else lowered


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


ScriptLogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]
Reduction = Annotated[Literal["mean", "sum"], BeforeValidator(_reduction)]
"""What the gradients of the ranks become; avg and average are other words for the mean."""
Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(integer)]
AnyDType = Annotated[DType, BeforeValidator(_dtype)]
"""fp32, bf16 or fp16; torch's names are accepted, too."""


class Fp16Section(Section):
    """The `fp16` section: 16-bit floats with a scaled loss."""

    enabled: Flag = False
    """Whether the model computes in fp16. "auto": bf16 on a GPU, fp32 on a CPU, unless bf16 says otherwise."""
    loss_scale: Annotated[Num, Field(ge=0)] = 0.0
    """Factor on the loss; 0 finds it while training."""
    initial_scale_power: Annotated[Int, Field(ge=0, le=127)] = 16
    """The first dynamic scale is 2 to this power."""
    loss_scale_window: Annotated[Int, Field(ge=1)] = 1000
    """Optimizer steps without overflow after which a dynamic scale doubles."""
    hysteresis: Annotated[Int, Field(ge=1)] = 2
    """Overflows before a dynamic scale halves."""
    consecutive_hysteresis: Flag = False
    """Whether a step without overflow refills the hysteresis."""
    min_loss_scale: Annotated[Num, Field(gt=0)] = 1.0
    """A dynamic scale never falls below this."""
    auto_cast: Flag = False
    """Whether floating-point inputs of the model are cast to fp16."""


class Bf16Section(Section):
    """The `bf16` section."""

    enabled: Flag = False
    """Whether the model computes in bfloat16, with fp32 master weights. "auto": on a GPU."""


class OffloadOptimizerSection(Section):
    """`zero_optimization.offload_optimizer`: where optimizer states live."""

    device: Literal["none", "cpu"] = "none"
    """`cpu` keeps states and fp32 master weights in host memory; `none` keeps them on the GPU."""
    pin_memory: Flag = False
    """Whether that host memory is pinned, which makes transfers faster."""
    ratio: Annotated[Num, Field(ge=0, le=1)] = 1.0
    """Share of the optimizer states to offload, 0 to 1."""


class OffloadParamSection(Section):
    """`zero_optimization.offload_param`: where the parameters' shards live at stage 3."""

    device: Literal["none", "cpu"] = "none"
    """`cpu` keeps each rank's shards in host memory until they are unsharded."""
    pin_memory: Flag = False
    """Whether that host memory is pinned, which makes transfers faster."""


class ZeroSection(Section):
    """The `zero_optimization` section. `true` is an old spelling of stage 1."""

    stage: Stage = 0
    """What is sharded over the ranks. 0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: OffloadOptimizerSection | None = None
    """Optimizer states in host memory."""
    offload_param: OffloadParamSection | None = None
    """Parameters in host memory; only at stage 3."""
    stage3_param_persistence_threshold: Annotated[Int, Field(ge=0)] = 100_000
    """Parameters with fewer elements are not sharded at stage 3, as all-gathering them costs more than keeping them."""


class ActivationCheckpointingSection(Section):
    """The `activation_checkpointing` section. Its presence turns checkpointing on in the built-in model; scripts call
    runtime.checkpointing.checkpoint."""

    cpu_checkpointing: Flag = False
    """Whether the inputs kept for recomputation are moved to host memory."""
    number_checkpoints: Annotated[Int, Field(ge=1)] | None = None
    """Number of segments into which the built-in model's blocks are grouped. Unset: one per block."""


class CheckpointSection(Section):
    """DeepSpeed's `checkpoint` section; zerotop's own keys are in zerotop.checkpoint."""

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], BeforeValidator(_lower)] = "warn"
    """What save_checkpoint() does if ranks pass different tags: use rank 0's silently, with a warning, or fail."""


class DataTypesSection(Section):
    """The `data_types` section."""

    grad_accum_dtype: AnyDType | None = None
    """Precision in which gradients accumulate. Unset: fp32."""
    param_dtype: AnyDType | None = None
    """Precision in which the model computes; only what fp16 and bf16 say."""
    buffer_dtype: AnyDType | None = None
    """DeepSpeed's name of zerotop.buffer_dtype."""
