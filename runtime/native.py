"""ctypes over the two kernel libraries built from csrc/: libzt_cpu.so and libzt_cuda.so.

Functions take torch tensors and hand raw addresses to C, so this module itself never imports torch.
A call drops the GIL. The formulas and their order of operations stand in csrc/formula.h; the plain torch reference is
runtime/optim/adamw.py.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ABI = {"libzt_cpu.so": 2, "libzt_cuda.so": 1}
SUM_BLOCK = 8192  # elements; ZT_BLOCK of csrc/formula.h
DTYPES = {"torch.float32": 1, "torch.bfloat16": 2}
"""What the kernels take, and csrc/'s number for it."""
_REBUILD = "build it with `make install` (it needs a C++ compiler)"

_u64, _i64, _i32, _f32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Hyper(ctypes.Structure):
    """struct ZtHyper of csrc/formula.h."""

    _fields_ = tuple(
        (name, _f32)
        for name in (
            "step_size",
            "one_minus_beta1",
            "beta2",
            "one_minus_beta2",
            "eps",
            "decay",
            "l2",
            "inv_sqrt_bc2",
            "grad_scale",
        )
    )


def _load(name: str) -> ctypes.CDLL:
    """Load a library from the package's folders (an editable install has two: the source's and site-packages')."""
    import runtime

    tried = [Path(folder, name) for folder in runtime.__path__]
    path = next((p for p in tried if p.exists()), None)
    if path is None:
        raise ImportError(f"{name} is not in {' or '.join(str(p.parent) for p in tried)}: {_REBUILD}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"{path} does not load ({error}): {_REBUILD}") from error
    if lib.zt_abi() != ABI[name]:
        raise ImportError(f"{path} has interface {lib.zt_abi()}, this zerotop needs {ABI[name]}: {_REBUILD}")
    return lib


@functools.cache
def cpu() -> ctypes.CDLL:
    """The CPU kernels.

    Raises:
        ImportError: not built, or built for another version; the message says how to build them.
    """
    lib = _load("libzt_cpu.so")
    lib.zt_isa.argtypes, lib.zt_isa.restype = [ctypes.c_char_p], ctypes.c_char_p
    lib.zt_adamw.argtypes = [_u64] * 5 + [_i64, _i32, _i32, ctypes.POINTER(_Hyper), _i32, ctypes.c_char_p]
    lib.zt_sum_of_squares.argtypes = [_u64, _i64, _i32, _i32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_double)]
    lib.zt_accumulate.argtypes = [_u64, _u64, _i64, _i32, _f32, _i32, ctypes.c_char_p]
    lib.zt_sum.argtypes = [_u64, _i32, ctypes.POINTER(_u64), _i64, _i64, _i64, _i32, _i32, _i32, ctypes.c_char_p]
    lib.zt_post.argtypes, lib.zt_post.restype = [_u64, ctypes.c_uint32], None
    lib.zt_wait.argtypes = [_u64, ctypes.c_uint32, _i64]
    return lib


@functools.cache
def cuda() -> ctypes.CDLL:
    """The CUDA kernels. Loads on a machine without a driver too; only calls need a GPU.

    Raises:
        ImportError: not built (no nvcc was found at install time), or built for another version.
    """
    lib = _load("libzt_cuda.so")
    lib.zt_error.argtypes, lib.zt_error.restype = [ctypes.c_int], ctypes.c_char_p
    lib.zt_adamw.argtypes = [_u64] * 5 + [_i64, _i32, _i32, ctypes.POINTER(_Hyper), _u64, _i32, _u64]
    lib.zt_sum_of_squares.argtypes = [_u64, _i64, _i32, _u64, _i32, _u64]
    return lib


def available() -> bool:
    """Whether the CPU kernels can be called."""
    try:
        cpu()
    except ImportError:
        return False
    return True


@functools.cache
def cuda_available() -> bool:
    """Whether the CUDA kernels can be called."""
    try:
        return int(cuda().zt_device_count()) > 0
    except ImportError:
        return False


def work_numel(numel: int) -> int:
    """fp64 elements of `work` that `cuda_sum_of_squares` of `numel` elements needs."""
    return max(1, 2 * -(-numel // SUM_BLOCK))


def isa(force: str = "") -> str | None:
    """The instruction set that would run: avx512, avx2, sve or generic.

    Args:
        force: ask for one by name; empty means ZEROTOP_ISA, and without that the best one of this CPU.

    Returns:
        Its name, or None where the one asked for was not built or does not run here.
    """
    name: bytes | None = cpu().zt_isa(force.encode())
    return name.decode() if name else None


def cpu_status() -> str:
    """One line for people: which CPU kernels run, or why none do."""
    try:
        chosen = isa()
    except ImportError as error:
        return f"not available: {error}"
    if chosen is None:
        return f"ZEROTOP_ISA={_env_isa()} does not run here; without it: {_best_isa()}"
    return f"{chosen}, up to {cpu().zt_max_threads()} threads"


def cuda_status() -> str:
    """One line for people: whether the CUDA kernels are built and how many GPUs they see."""
    try:
        count = cuda().zt_device_count()
    except ImportError as error:
        return f"not available: {error}"
    return "built, but no GPU or driver here" if count < 1 else f"built, {count} GPU{'s' if count > 1 else ''}"


def hyper(
    *, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_scale: float, adamw: bool
) -> _Hyper:
    """The constants of one step as the kernels take them: computed in double, rounded to fp32 once."""
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    return _Hyper(
        step_size=lr / (1 - beta1**step),
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=eps,
        decay=1 - lr * weight_decay if adamw else 1.0,
        l2=0.0 if adamw else weight_decay,
        inv_sqrt_bc2=1 / math.sqrt(1 - beta2**step),
        grad_scale=grad_scale,
    )


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
    threads: int | None = None,
    isa: str = "",
) -> None:
    """One AdamW (or Adam) step on the CPU, in place and in one pass: unscale, clip, moments, decay, update, cast.

    The bits do not depend on threads or isa. A NaN or infinity in g goes through to p, as in torch.

    Args:
        p, m, v: (numel,) fp32; parameters (or their master copy), first and second moment. Updated.
        g: (numel,) fp32 or bf16 gradient. Only read.
        out: (numel,) bf16 that receives the new parameters rounded to nearest even; None: p is the parameter.
        step: optimizer steps including this one, from 1.
        weight_decay: decoupled when adamw, else added to the gradient (L2).
        grad_scale: factor on g: 1 / loss scale x clip factor x 1 / accumulation, whatever applies.
        threads: CPU threads; None: OpenMP's default (OMP_NUM_THREADS, else all cores).
        isa: force an instruction set by name.

    Raises:
        ValueError: a tensor has the wrong device, dtype, length or layout; an isa that does not run here.
        ImportError: the kernels are not built.
    """
    n = p.numel()
    for name, t in (("p", p), ("m", m), ("v", v)):
        _check(name, t, n, ("torch.float32",), "cpu")
    _check("g", g, n, tuple(DTYPES), "cpu")
    if out is not None:
        _check("out", out, n, ("torch.bfloat16",), "cpu")
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
    code = cpu().zt_adamw(
        p.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        out.data_ptr() if out is not None else 0,
        n,
        DTYPES[str(g.dtype)],
        int(not adamw),
        ctypes.byref(h),
        threads or 0,
        isa.encode(),
    )
    _raise_for(code, isa)


def sum_of_squares(x: torch.Tensor, *, threads: int | None = None, isa: str = "") -> tuple[float, bool]:
    """Sum of squares of a CPU tensor, accumulated in double in one fixed order.

    The same bits come out for any thread count and ISA, and from `cuda_sum_of_squares`.

    Args:
        x: (numel,) fp32 or bf16.

    Returns:
        The sum, and whether any element is NaN or infinite (a double cannot overflow on squares of floats, so the
        sum is finite exactly when every element is).
    """
    _check("x", x, x.numel(), tuple(DTYPES), "cpu")
    total = ctypes.c_double()
    code = cpu().zt_sum_of_squares(
        x.data_ptr(), x.numel(), DTYPES[str(x.dtype)], threads or 0, isa.encode(), ctypes.byref(total)
    )
    _raise_for(code, isa)
    return total.value, not math.isfinite(total.value)


def accumulate(
    acc: torch.Tensor, g: torch.Tensor, *, scale: float = 1.0, threads: int | None = None, isa: str = ""
) -> None:
    """acc += scale * g in one pass, rounded once. For bf16 g about five times as fast as torch's `acc.add_(g)`.

    Args:
        acc: (numel,) fp32 on the CPU. Updated.
        g: (numel,) fp32 or bf16.
    """
    _check("acc", acc, acc.numel(), ("torch.float32",), "cpu")
    _check("g", g, acc.numel(), tuple(DTYPES), "cpu")
    code = cpu().zt_accumulate(
        acc.data_ptr(), g.data_ptr(), acc.numel(), DTYPES[str(g.dtype)], scale, threads or 0, isa.encode()
    )
    _raise_for(code, isa)


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
        target: (numel,) fp32 or bf16 on the CPU. May be the same memory as a source's elements from `begin`.
        sources: addresses of arrays of `dtype` ("torch.float32" or "torch.bfloat16"), which must be long enough.
    """
    _check("target", target, target.numel(), tuple(DTYPES), "cpu")
    code = cpu().zt_sum(
        target.data_ptr(),
        DTYPES[str(target.dtype)],
        (_u64 * len(sources))(*sources),
        len(sources),
        begin,
        target.numel(),
        DTYPES[dtype],
        int(add),
        threads or 0,
        isa.encode(),
    )
    _raise_for(code, isa)


def post(address: int, number: int) -> None:
    """Store a 32-bit `number` at `address` (shared memory) for those who `wait` for it; earlier writes are seen with
    it."""
    cpu().zt_post(address, number & 0xFFFFFFFF)


def wait(address: int, number: int, timeout_us: int) -> bool:
    """Whether the 32-bit number at `address` reaches `number` (modulo 2**32) within the time. Drops the GIL."""
    return bool(cpu().zt_wait(address, number & 0xFFFFFFFF, timeout_us))


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
        _check(name, t, n, ("torch.float32",), "cuda")
    _check("g", g, n, tuple(DTYPES), "cuda")
    if out is not None:
        _check("out", out, n, ("torch.bfloat16",), "cuda")
    if isinstance(grad_scale, (int, float)):
        factor, factor_address = float(grad_scale), 0
    else:
        _check("grad_scale", grad_scale.view(-1), 1, ("torch.float32",), "cuda")
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
    _raise_for_cuda(code)


def cuda_sum_of_squares(x: torch.Tensor, work: torch.Tensor, *, stream: int) -> None:
    """`sum_of_squares` on a GPU, without a synchronisation: the sum is left in work[0].

    Args:
        x: (numel,) fp32 or bf16.
        work: (>= 2 * ceil(numel / SUM_BLOCK), at least 1) fp64 on the same GPU; overwritten.
    """
    _check("x", x, x.numel(), tuple(DTYPES), "cuda")
    need = work_numel(x.numel())
    if work.numel() < need:
        raise ValueError(f"work has {work.numel()} elements; {x.numel()} elements of x need {need}")
    _check("work", work, work.numel(), ("torch.float64",), "cuda")
    _raise_for_cuda(
        cuda().zt_sum_of_squares(x.data_ptr(), x.numel(), DTYPES[str(x.dtype)], work.data_ptr(), x.device.index, stream)
    )


def _check(name: str, t: torch.Tensor, n: int, dtypes: tuple[str, ...], device: str) -> None:
    if t.device.type != device:
        raise ValueError(f"{name} must be on {device}, is on {t.device}")
    if str(t.dtype) not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(dtypes)}, is {t.dtype}")
    if t.dim() != 1 or not t.is_contiguous():
        raise ValueError(
            f"{name} must be one-dimensional and contiguous, is {tuple(t.shape)} with strides {t.stride()}"
        )
    if t.numel() != n:
        raise ValueError(f"{name} has {t.numel()} elements instead of {n}")


def _raise_for(code: int, force: str) -> None:
    if code == -1:
        asked = f"isa={force!r}" if force else f"ZEROTOP_ISA={_env_isa()}"
        raise ValueError(f"{asked} was not built or does not run on this CPU; the best here is {_best_isa()}")
    if code:
        raise MemoryError("no memory for the partial sums")


def _raise_for_cuda(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA: {cuda().zt_error(code).decode()} (error {code})")


def _env_isa() -> str:
    return os.environ.get("ZEROTOP_ISA", "")


def _best_isa() -> str:
    return next(name for name in ("avx512", "avx2", "sve", "generic") if isa(name))
