"""DeepSpeed's names of where states can be, and of which states engine.offload_states() can move."""

from __future__ import annotations

from enum import StrEnum


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
