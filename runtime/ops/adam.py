"""DeepSpeed's Adams by name. Each makes a plain torch AdamW (or Adam, with L2 decay) for initialize(optimizer=...). The
engine does its update with its own fused kernels on the device where the states are, so the two are the same here.

Signatures: deepspeed/ops/adam/fused_adam.py and cpu_adam.py.
"""

from __future__ import annotations

from typing import Any

import torch


def FusedAdam(
    params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    adam_w_mode: bool = True,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    set_grad_none: bool = True,
) -> torch.optim.Optimizer:
    """set_grad_none: accepted and not needed, for the engine drops gradients itself."""
    return _make(params, adam_w_mode, bias_correction, amsgrad, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def DeepSpeedCPUAdam(
    model_params: Any,
    lr: float = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0,
    amsgrad: bool = False,
    adamw_mode: bool = True,
    fp32_optimizer_states: bool = True,
) -> torch.optim.Optimizer:
    """It does not choose where the states are: zero_optimization.offload_optimizer does. They are always fp32."""
    if not fp32_optimizer_states:
        raise ValueError("DeepSpeedCPUAdam(fp32_optimizer_states=False): optimizer states are always fp32 here")
    return _make(
        model_params, adamw_mode, bias_correction, amsgrad, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )


def _make(params: Any, decoupled: bool, bias_correction: bool, amsgrad: bool, **numbers: Any) -> torch.optim.Optimizer:
    if amsgrad:
        raise ValueError("amsgrad=True is not supported, as in DeepSpeed; use amsgrad=False")
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(params, **numbers)
    for group in optimizer.param_groups:
        group["bias_correction"] = bias_correction
    return optimizer
