"""The CUDA kernels: csrc/cuda. Every call only enqueues work on a stream."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from runtime.native.loading import DTYPES, SUM_BLOCK, check, cuda, hyper, raise_for_cuda

if TYPE_CHECKING:
    import torch


def cuda_adamw(
    p: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    stream: int,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | torch.Tensor = 1.0,
    adamw: bool = True,
) -> None:
    """`adamw` on GPU tensors: enqueued on a stream, same bits as on the CPU.

    Args:
        stream: `torch.cuda.current_stream(p.device).cuda_stream`.
        grad_scale: a number, or one fp32 on the same GPU, so that a clip factor computed there never visits the host.

    Raises:
        ValueError: as `adamw`.
        RuntimeError: CUDA refused the launch.
    """
    n = p.numel()
    for name, t in (("p", p), ("m", m), ("v", v)):
        check(name, t, n, ("torch.float32",), "cuda")
    check("g", g, n, tuple(DTYPES), "cuda")
    if out is not None:
        check("out", out, n, ("torch.bfloat16",), "cuda")
    if isinstance(grad_scale, (int, float)):
        factor, factor_address = float(grad_scale), 0
    else:
        check("grad_scale", grad_scale.view(-1), 1, ("torch.float32",), "cuda")
        factor, factor_address = 1.0, grad_scale.data_ptr()
    h = hyper(
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=factor,
        adamw=adamw,
    )
    code = cuda().zt_adamw(
        p.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        out.data_ptr() if out is not None else 0,
        n,
        DTYPES[str(g.dtype)],
        int(not adamw),
        ctypes.byref(h),
        factor_address,
        p.device.index,
        stream,
    )
    raise_for_cuda(code)


def cuda_sum_of_squares(x: torch.Tensor, work: torch.Tensor, *, stream: int) -> None:
    """`sum_of_squares` on a GPU, without a synchronisation: the sum is left in work[0].

    Args:
        x: (numel,) fp32 or bf16.
        work: (>= 2 * ceil(numel / SUM_BLOCK), at least 1) fp64 on the same GPU; overwritten.
    """
    check("x", x, x.numel(), tuple(DTYPES), "cuda")
    need = max(1, 2 * -(-x.numel() // SUM_BLOCK))
    if work.numel() < need:
        raise ValueError(f"work has {work.numel()} elements; {x.numel()} elements of x need {need}")
    check("work", work, work.numel(), ("torch.float64",), "cuda")
    raise_for_cuda(
        cuda().zt_sum_of_squares(x.data_ptr(), x.numel(), DTYPES[str(x.dtype)], work.data_ptr(), x.device.index, stream)
    )
