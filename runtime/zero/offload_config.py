"""DeepSpeed's names of stages, of where states can be, and of which states engine.offload_states() can move."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class ZeroStageEnum(IntEnum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class OffloadDeviceEnum(StrEnum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"
    """Known, and refused: nothing is offloaded to NVMe here."""


class OffloadStateTypeEnum(StrEnum):
    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"
