"""DeepSpeed's Adam classes, for initialize(optimizer=...). Both are the same here, torch's AdamW (or Adam, with L2
decay): the engine runs the update with its own fused kernels on the device that holds the states.

Signatures: deepspeed/ops/adam/fused_adam.py and cpu_adam.py.
"""

from __future__ import annotations

from typing import Any

import torch


class _Adam(torch.optim.AdamW):
    def __init__(self, params: Any, decoupled: bool, bias_correction: bool, amsgrad: bool, **numbers: Any) -> None:
        if amsgrad:
            raise ValueError("amsgrad=True is not supported, as in DeepSpeed; use amsgrad=False")
        super().__init__(params, **numbers)
        for group in self.param_groups:
            group["decoupled_weight_decay"], group["bias_correction"] = decoupled, bias_correction


class FusedAdam(_Adam):
    """Adam with DeepSpeed's signature. set_grad_none: ignored, as the engine clears gradients itself."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(
            params, adam_w_mode, bias_correction, amsgrad, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )


class DeepSpeedCPUAdam(_Adam):
    """Adam with DeepSpeed's signature. States are on the CPU only if zero_optimization.offload_optimizer says so, and
    always fp32."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPUAdam(fp32_optimizer_states=False): optimizer states are always fp32 here")
        super().__init__(
            model_params, adamw_mode, bias_correction, amsgrad, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
