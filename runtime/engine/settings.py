"""What training scripts ask an engine about its config, with DeepSpeed's names."""

from __future__ import annotations

from typing import Any

import torch

from runtime.config import Resolved
from runtime.optim.optimizer import ZeroOptimizer
from runtime.state.precision import DTYPES


class Settings:
    """The part of `Engine` that knows the config. What DeepSpeed chooses and zerotop does not (see the notes that
    initialize() gives about keys without effect) is answered as it is here."""

    config: Resolved
    optimizer: ZeroOptimizer

    # ---- the batch ---------------------------------------------------------------------------------------------------
    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.config.accumulation

    def train_batch_size(self) -> int:
        return self.config.global_batch

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return self.config.global_batch, self.config.micro_batch, self.config.accumulation

    # ---- ZeRO --------------------------------------------------------------------------------------------------------
    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.config.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.config.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.config.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.config.stage >= 3

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states are in host memory."""
        return self.config.offload_optimizer is not None

    zero_use_cpu_optimizer = zero_cpu_offload

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Always: save_16bit_model() gathers whatever the key says."""
        return True

    def zero_param_persistence_threshold(self) -> int:
        return self.config.persistence_threshold

    # ---- numbers -----------------------------------------------------------------------------------------------------
    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def fp16_enabled(self) -> bool:
        return self.config.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.config.precision == "bf16"

    def amp_enabled(self) -> bool:
        """Never: a config that asks for Apex is refused."""
        return False

    def torch_autocast_enabled(self) -> bool:
        """Never: a config that asks for it is refused."""
        return False

    def dynamic_loss_scale(self) -> bool:
        return self.config.precision == "fp16" and self.config.fp16.loss_scale == 0

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype that the model computes in, dtype that gradients accumulate in)."""
        return DTYPES[self.config.precision], DTYPES[self.config.grad_accum_dtype]

    @property
    def communication_data_type(self) -> torch.dtype:
        """In which gradients are reduced."""
        if self.config.communication_data_type is not None:
            return DTYPES[self.config.communication_data_type]
        return DTYPES[self.config.precision if self.config.stage >= 2 else self.config.grad_accum_dtype]

    def postscale_gradients(self) -> bool:
        return not self.config.prescale_gradients

    def gradient_predivide_factor(self) -> float:
        return self.config.gradient_predivide_factor

    # ---- optimizer and schedule --------------------------------------------------------------------------------------
    def optimizer_name(self) -> str | None:
        """Of the config's optimizer, in lower case as DeepSpeed has it; of the script's own, its class."""
        if not self.optimizer.trains:
            return None
        return self.optimizer.kind if self.config.optimizer is None else self.config.optimizer.type.lower()

    def optimizer_params(self) -> dict[str, Any] | None:
        return self.config.optimizer.torch_kwargs() if self.config.optimizer is not None else None

    def scheduler_name(self) -> str | None:
        """Of the config's scheduler; None where there is none, or the script brought one."""
        return self.config.scheduler.type if self.config.scheduler is not None else None

    def dataloader_drop_last(self) -> bool:
        return self.config.dataloader_drop_last

    # ---- what is printed ---------------------------------------------------------------------------------------------
    def steps_per_print(self) -> int:
        """Steps between two progress lines: zerotop.log.interval."""
        return self.config.zerotop.log.interval

    def wall_clock_breakdown(self) -> bool:
        """Always: times are always measured, and the screen shows them."""
        return True
