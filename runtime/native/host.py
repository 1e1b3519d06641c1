"""Calls of the CPU kernels in csrc/cpu. Their reference in plain torch is runtime/optim/adamw.py."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.native.loading import DTYPES, check, check_overlap, cpu, hyper, raise_for, u64

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


class Rounding(NamedTuple):
    """Random numbers for moments in bf16: see zt_random in csrc/formula.h."""

    first: int
    """The unit's index of the first element."""
    key: int
    second_key: int
    """32 bits each, of the unit and the step."""


def adamw(
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
    rounding: Rounding | None = None,
    threads: int | None = None,
    isa: str = "",
) -> None:
    """One AdamW (or Adam) step on the CPU, in place and in one pass: unscale, clip, moments, decay, update, cast.

    The bits do not depend on threads or isa. A NaN or infinity in g goes through to p, as in torch.

    Args:
        p, m, v: (numel,) fp32; parameters (or their master copy), first and second moment. Updated. The moments may be
            bf16; they are then rounded stochastically, as `rounding` says.
        g: (numel,) fp32, bf16 or fp16 gradient. Only read.
        out: (numel,) fp32, bf16 or fp16 that receives the new parameters rounded to nearest even (a NaN becomes
            0x7fc0 or 0x7e00); None: p is the parameter. May be g's own memory where elements have the same size.
        step: optimizer steps including this one, from 1.
        weight_decay: decoupled when adamw, else added to the gradient (L2).
        grad_scale: factor on g: 1 / loss scale x clip factor x 1 / accumulation, whatever applies.
        rounding: of moments in bf16.
        threads: CPU threads; None: OpenMP's default (OMP_NUM_THREADS, else all cores).
        isa: force an instruction set by name.

    Raises:
        ValueError: a tensor has the wrong device, dtype, length or layout; an isa that does not run here.
        ImportError: the kernels are not built.
    """
    n = p.numel()
    moments = "torch.float32" if rounding is None else "torch.bfloat16"
    for name, t, dtype in (("p", p, "torch.float32"), ("m", m, moments), ("v", v, moments)):
        check(name, t, n, (dtype,), "cpu")
    check("g", g, n, tuple(DTYPES), "cpu")
    if out is not None:
        check("out", out, n, tuple(DTYPES), "cpu")
        check_overlap(g, out)
    h = hyper(
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        adamw=adamw,
    )
    lib = cpu()
    kernel = lib.zt_adamw if rounding is None else functools.partial(_rounded, lib.zt_adamw_bf16, rounding)
    code = kernel(
        p.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        out.data_ptr() if out is not None else 0,
        n,
        DTYPES[str(g.dtype)],
        DTYPES[str(out.dtype)] if out is not None else 0,
        int(not adamw),
        ctypes.byref(h),
        threads or 0,
        isa.encode(),
    )
    raise_for(code, isa)


def _rounded(kernel: Callable[..., int], rounding: Rounding, *arguments: Any) -> int:
    """zt_adamw_bf16, which has the arguments of `rounding` before the last two."""
    first = rounding.first & 0xFFFFFFFF
    return kernel(*arguments[:-2], first, rounding.key, rounding.second_key, *arguments[-2:])


def sum_of_squares(x: torch.Tensor, *, threads: int | None = None, isa: str = "") -> tuple[float, bool]:
    """Sum of squares of a CPU tensor, accumulated in double in one fixed order.

    The same bits come out for any thread count and ISA, and from `cuda_sums_of_squares`.

    Args:
        x: (numel,) fp32, bf16 or fp16.

    Returns:
        The sum, and whether any element is NaN or infinite (a double cannot overflow on squares of floats, so the
        sum is finite exactly when every element is).
    """
    check("x", x, x.numel(), tuple(DTYPES), "cpu")
    total = ctypes.c_double()
    code = cpu().zt_sum_of_squares(
        x.data_ptr(), x.numel(), DTYPES[str(x.dtype)], threads or 0, isa.encode(), ctypes.byref(total)
    )
    raise_for(code, isa)
    return total.value, not math.isfinite(total.value)


def accumulate(
    acc: torch.Tensor, g: torch.Tensor, *, scale: float = 1.0, threads: int | None = None, isa: str = ""
) -> None:
    """acc += scale * g in one pass, rounded once; for 16-bit g several times as fast as torch's `acc.add_(g)`.

    Args:
        acc: (numel,) fp32 on the CPU. Updated.
        g: (numel,) fp32, bf16 or fp16.
    """
    check("acc", acc, acc.numel(), ("torch.float32",), "cpu")
    check("g", g, acc.numel(), tuple(DTYPES), "cpu")
    code = cpu().zt_accumulate(
        acc.data_ptr(), g.data_ptr(), acc.numel(), DTYPES[str(g.dtype)], scale, threads or 0, isa.encode()
    )
    raise_for(code, isa)


def sum_into(
    target: torch.Tensor,
    sources: Sequence[int],
    begin: int,
    dtype: str,
    *,
    add: bool,
    threads: int | None = None,
    isa: str = "",
) -> None:
    """target[i] = (target[i] if add else 0) + sum over sources of source[begin + i]: in fp32, in their order, rounded
    once.

    Args:
        target: (numel,) fp32, bf16 or fp16 on the CPU. May be the same memory as a source's elements from `begin`.
        sources: addresses of arrays of `dtype` ("torch.float32", "torch.bfloat16", "torch.float16"), which must be
            long enough.
    """
    check("target", target, target.numel(), tuple(DTYPES), "cpu")
    code = cpu().zt_sum(
        target.data_ptr(),
        DTYPES[str(target.dtype)],
        (u64 * len(sources))(*sources),
        len(sources),
        begin,
        target.numel(),
        DTYPES[dtype],
        int(add),
        threads or 0,
        isa.encode(),
    )
    raise_for(code, isa)


def touch(address: int, nbytes: int, *, nodes: Sequence[int] = (), threads: int | None = None) -> None:
    """Bring the zero pages of a new mapping into memory, on the NUMA nodes of the `threads` threads that touch them.

    Args:
        nodes: NUMA nodes (below 64) to take the pages from instead: one is preferred, several are interleaved. Has no
            effect where the system forbids it (in containers).
    """
    if nodes:
        cpu().zt_prefer_nodes(address, nbytes, sum(1 << node for node in set(nodes)))
    cpu().zt_touch(address, nbytes, mmap.PAGESIZE, threads or 0)


def copy_past_cache(target: torch.Tensor, source: torch.Tensor, *, threads: int | None = None) -> None:
    """target = source, bit for bit, with stores that bypass the caches: for copies of many megabytes that are not read
    soon.

    Args:
        target, source: (numel,) of one dtype, on the CPU, not overlapping.
        threads: CPU threads; None: OpenMP's default (OMP_NUM_THREADS, else all cores).
    """
    dtypes = (str(target.dtype),)
    check("target", target, target.numel(), dtypes, "cpu")
    check("source", source, target.numel(), dtypes, "cpu")
    cpu().zt_copy(target.data_ptr(), source.data_ptr(), target.nbytes, threads or 0)


def post(address: int, number: int) -> None:
    """Store a 32-bit `number` at `address` in shared memory and wake processes that `wait` for it. They see all earlier
    writes, too."""
    cpu().zt_post(address, number & 0xFFFFFFFF)


def wait(address: int, number: int, timeout_us: int) -> bool:
    """Wait until the 32-bit number at `address` reaches `number` (modulo 2**32). Returns False after `timeout_us`
    microseconds. Releases the GIL."""
    return bool(cpu().zt_wait(address, number & 0xFFFFFFFF, timeout_us))
