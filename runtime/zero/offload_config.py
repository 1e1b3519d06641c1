"""DeepSpeed's classes of the sections offload_optimizer and offload_param, and its enums of devices and states.

initialize() reads runtime/config/deepspeed.py instead: these are for scripts that build or read sections by their
class.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OffloadDeviceEnum(StrEnum):
    """Devices to which states are offloaded, by DeepSpeed's names."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"
    """Not supported: a config that names it is refused."""


class OffloadStateTypeEnum(StrEnum):
    """States that engine.offload_states() moves, by DeepSpeed's names."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class DeepSpeedSection(BaseModel):
    """A section of a config by DeepSpeed's rules: "auto" is a default, an unknown key an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value != "auto"} if isinstance(given, dict) else given


class DeepSpeedZeroOffloadParamConfig(DeepSpeedSection):
    """`zero_optimization.offload_param`, with DeepSpeed's defaults."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(5, ge=0)
    buffer_size: int = Field(100_000_000, ge=0)
    max_in_cpu: int = Field(1_000_000_000, ge=0)
    pin_memory: bool = True


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedSection):
    """`zero_optimization.offload_optimizer`, with DeepSpeed's defaults."""

    device: OffloadDeviceEnum = OffloadDeviceEnum.none
    nvme_path: Path | None = None
    buffer_count: int = Field(4, ge=0)
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = Field(1.0, ge=0.0, le=1.0)
    super_offload: bool = False
    cpuadam_cores_perc: float = Field(0.8, ge=0.0, le=1.0)

    @property
    def pipeline(self) -> bool:
        """Whether reading or writing of states on NVMe is pipelined."""
        return self.pipeline_read or self.pipeline_write
