"""`deepspeed.DeepSpeedConfig`: a checked and completed config that initialize() accepts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from runtime.accelerator import get_accelerator
from runtime.config import Device, Resolved, load
from runtime.zero.config import DeepSpeedZeroConfig


class DeepSpeedConfig:
    """The config in a file, a dictionary or base64 text, resolved for the current world size (1 without a process
    group).

    Raises ConfigError if it is invalid.
    """

    def __init__(self, config: str | Path | Mapping[str, Any], mpu: Any = None, mesh_device: Any = None) -> None:
        """mpu, mesh_device: ignored; initialize() refuses those that split the model."""
        found = load(config)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        device: Device = "cuda" if get_accelerator().device_name() == "cuda" else "cpu"
        self._fill(found.resolve(self.world_size, device, script=True))
        self._param_dict: dict[str, Any] | None = found.raw
        """The config as it was given; None if it is an engine's."""
        section = found.raw.get("zero_optimization") or {}
        self.zero_config = DeepSpeedZeroConfig(**(section if isinstance(section, Mapping) else {"stage": 1}))
        """The zero_optimization section, with DeepSpeed's defaults for what it leaves out."""

    @classmethod
    def of(cls, resolved: Resolved) -> DeepSpeedConfig:
        """The config of an engine, for scripts that read `engine._config`."""
        made = cls.__new__(cls)
        made.world_size, made._param_dict = resolved.world_size, None
        made._fill(resolved)
        kept = {key: getattr(resolved, key) for key in ("offload_optimizer", "offload_param")}
        section: dict[str, Any] = {
            "stage": resolved.stage,
            "param_persistence_threshold": resolved.persistence_threshold,
        }
        section |= {key: {"device": "cpu", "pin_memory": value.pin_memory} for key, value in kept.items() if value}
        made.zero_config = DeepSpeedZeroConfig(**section)
        return made

    def _fill(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.global_rank = dist.get_rank() if dist.is_initialized() else 0
        self.train_batch_size = resolved.global_batch
        self.train_micro_batch_size_per_gpu = resolved.micro_batch
        self.gradient_accumulation_steps = resolved.accumulation
        self.managed_gradient_accumulation = resolved.managed_accumulation
        self.gradient_clipping = resolved.gradient_clipping
        self.zero_optimization_stage = resolved.stage
        self.zero_enabled = resolved.stage > 0
        self.fp16_enabled, self.bfloat16_enabled = resolved.precision == "fp16", resolved.precision == "bf16"
        self.param_dtype = None  # what fp16 and bf16 say
        self.buffer_dtype, self.log_level = resolved.zerotop.buffer_dtype, resolved.log_level
        self.gradient_allreduce_op = resolved.gradient_allreduce_op
        self.prescale_gradients = resolved.prescale_gradients
        self.gradient_predivide_factor = resolved.gradient_predivide_factor
        self.dataloader_drop_last = resolved.dataloader_drop_last
        self.optimizer_name = resolved.optimizer.type.lower() if resolved.optimizer is not None else None
        self.optimizer_params = resolved.optimizer.torch_kwargs() if resolved.optimizer is not None else None
        self.scheduler_name = resolved.scheduler.type if resolved.scheduler is not None else None
