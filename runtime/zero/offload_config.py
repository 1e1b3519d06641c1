"""DeepSpeed's enums of stages, of offload devices and of the states that engine.offload_states() moves."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ZeroStageEnum(IntEnum):
    """DeepSpeed's names of the ZeRO stages."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


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
