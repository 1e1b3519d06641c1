"""Lion (arXiv 2302.06675) by DeepSpeed's names, for initialize(optimizer=...): torch.optim has none. The engine trains
it on the device where the states are, so the two are the same here.

Signatures: deepspeed/ops/lion/fused_lion.py and cpu_lion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedLion(torch.optim.Optimizer):
    """A step of `lr` in the direction of the sign of a running average. Weights decay directly, by lr * weight_decay.

    set_grad_none: accepted and not needed, for the engine drops gradients itself.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(average.lerp(parameter.grad, 1 - first).sign_(), alpha=-group["lr"])
                average.lerp_(parameter.grad, 1 - second)
        return loss


class DeepSpeedCPULion(FusedLion):
    """It does not choose where the states are: zero_optimization.offload_optimizer does. They are always fp32."""

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        if not fp32_optimizer_states:
            raise ValueError("DeepSpeedCPULion(fp32_optimizer_states=False): optimizer states are always fp32 here")
        super().__init__(model_params, lr=lr, betas=betas, weight_decay=weight_decay)
