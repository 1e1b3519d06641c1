"""AdamW and Adam in plain torch: the reference of the fused kernels, and their fallback where they are not built."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def adamw_reference(
    p: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    adamw: bool = True,
) -> None:
    """One step in place; arguments as `runtime.native.adamw`, on any device.

    Decoupled weight decay (adamw): arXiv 1711.05101; without it the decay joins the gradient (Adam, arXiv 1412.6980).
    Order of operations: torch.optim.AdamW's.
    """
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    grad = g.float() * grad_scale
    if adamw:
        p.mul_(1 - lr * weight_decay)
    else:
        grad = grad.add_(p, alpha=weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denom = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    p.addcdiv_(m, denom, value=-lr / (1 - beta1**step))
    if out is not None:
        out.copy_(p)
