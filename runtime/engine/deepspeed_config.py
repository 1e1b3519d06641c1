"""`deepspeed.DeepSpeedConfig`: a config that is checked and completed before initialize() takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from runtime.accelerator import get_accelerator
from runtime.config import load


class DeepSpeedConfig:
    """Of a file, a dictionary or base64 text, for the ranks that there are (one without a process group).

    Raises ConfigError for one that can't be used.
    """

    def __init__(self, config: str | Path | Mapping[str, Any], mpu: Any = None, mesh_device: Any = None) -> None:
        """mpu, mesh_device: accepted and not needed; initialize() says so where they split the model."""
        found = load(config)
        self._param_dict = found.raw
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.global_rank = dist.get_rank() if dist.is_initialized() else 0
        resolved = found.resolve(
            self.world_size, "cuda" if get_accelerator().device_name() == "cuda" else "cpu", script=True
        )
        self.train_batch_size = resolved.global_batch
        self.train_micro_batch_size_per_gpu = resolved.micro_batch
        self.gradient_accumulation_steps = resolved.accumulation
        self.gradient_clipping = resolved.gradient_clipping
        self.zero_optimization_stage = resolved.stage
        self.zero_enabled = resolved.stage > 0
        self.fp16_enabled, self.bfloat16_enabled = resolved.precision == "fp16", resolved.precision == "bf16"
        self.gradient_allreduce_op = "mean"  # other ones are refused
        self.prescale_gradients = resolved.prescale_gradients
        self.gradient_predivide_factor = resolved.gradient_predivide_factor
        self.dataloader_drop_last = resolved.dataloader_drop_last
        self.optimizer_name = resolved.optimizer.type.lower() if resolved.optimizer is not None else None
        self.optimizer_params = resolved.optimizer.torch_kwargs() if resolved.optimizer is not None else None
        self.scheduler_name = resolved.scheduler.type if resolved.scheduler is not None else None
        self.zero_config = found.zero_optimization
        """With its keys as attributes."""
