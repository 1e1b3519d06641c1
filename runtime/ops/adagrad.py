"""DeepSpeedCPUAdagrad. Signature: deepspeed/ops/adagrad/cpu_adagrad.py."""

from __future__ import annotations

from typing import Any

import torch


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad with DeepSpeed's signature. States are on the CPU only if zero_optimization.offload_optimizer says so,
    and always fp32."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        """amsgrad: ignored, as in DeepSpeed."""
        if not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdagrad(fp32_optimizer_states=False): optimizer states are always fp32 here")
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)
