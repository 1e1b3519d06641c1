"""Finds, loads and describes the libraries built from csrc/, and checks arguments of calls into them.

Functions of this package take torch tensors and pass raw addresses to C; none of it imports torch. A call releases the
GIL.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ABI = {"libzt_cpu.so": 6, "libzt_cuda.so": 5, "libzt_term.so": 1}
SUM_BLOCK = 8192  # elements; ZT_BLOCK of csrc/formula.h
DTYPES = {"torch.float32": 1, "torch.bfloat16": 2, "torch.float16": 3}  # enum Dtype of csrc/cpu/kernels.h
_NO_DEVICE = 100  # cudaErrorNoDevice
INSUFFICIENT_DRIVER = 35
"""cudaErrorInsufficientDriver: an old driver, or none."""
_REBUILD = "build it with `make install` (it needs a C++ compiler)"

u64, i64, i32, f32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Hyper(ctypes.Structure):
    """struct ZtHyper of csrc/formula.h."""

    _fields_ = tuple(
        (name, f32)
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


class RangeStruct(ctypes.Structure):
    """struct ZtRange of csrc/ranges.h."""

    _fields_ = (
        *((name, u64) for name in ("p", "m", "v", "g", "out")),
        ("n", i64),
        ("hyper", i32),
        ("place", i32),
    )


def _load(name: str) -> ctypes.CDLL:
    """Load a library from the package's folders (an editable install has two: the source's and site-packages')."""
    tried = [Path(folder, name) for folder in sys.modules[__name__.partition(".")[0]].__path__]
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
    lib.zt_adamw.argtypes = [u64] * 5 + [i64, i32, i32, i32, ctypes.POINTER(Hyper), i32, ctypes.c_char_p]
    u32 = ctypes.c_uint32
    lib.zt_adamw_bf16.argtypes = [*lib.zt_adamw.argtypes[:10], u32, u32, u32, i32, ctypes.c_char_p]
    lib.zt_sum_of_squares.argtypes = [u64, i64, i32, i32, ctypes.c_char_p, ctypes.POINTER(ctypes.c_double)]
    lib.zt_accumulate.argtypes = [u64, u64, i64, i32, f32, i32, ctypes.c_char_p]
    lib.zt_sum.argtypes = [u64, i32, ctypes.POINTER(u64), i64, i64, i64, i32, i32, i32, ctypes.c_char_p]
    lib.zt_prefer_nodes.argtypes = [u64, i64, u64]
    lib.zt_touch.argtypes, lib.zt_touch.restype = [u64, i64, i64, i32], None
    lib.zt_copy.argtypes, lib.zt_copy.restype = [u64, u64, i64, i32], None
    lib.zt_post.argtypes, lib.zt_post.restype = [u64, ctypes.c_uint32], None
    lib.zt_wait.argtypes = [u64, ctypes.c_uint32, i64]
    return lib


@functools.cache
def term() -> ctypes.CDLL:
    """The library that handles signals in a rank: csrc/sigterm.cpp.

    Raises:
        ImportError: not built, or built for another version.
    """
    lib = _load("libzt_term.so")
    lib.zt_hand_on.argtypes = [i32, i32, i64]
    lib.zt_supervisor_is_watched.restype = None
    return lib


@functools.cache
def cuda() -> ctypes.CDLL:
    """The CUDA kernels. The library loads without a driver, too; only calls need a GPU.

    Raises:
        ImportError: not built (no nvcc was found at install time), or built for another version.
    """
    lib = _load("libzt_cuda.so")
    lib.zt_error.argtypes, lib.zt_error.restype = [ctypes.c_int], ctypes.c_char_p
    ranges, hypers = ctypes.POINTER(RangeStruct), ctypes.POINTER(Hyper)
    lib.zt_adamw.argtypes = [ranges, i64, hypers, i32, i32, i32, u64, u64, i32, u64]
    lib.zt_sums_of_squares.argtypes = [ctypes.POINTER(u64), ctypes.POINTER(i64), ctypes.POINTER(i32)]
    lib.zt_sums_of_squares.argtypes += [i64, u64, u64, i32, u64]
    lib.zt_stream_bytes.argtypes, lib.zt_stream_bytes.restype = [i64, i32, i32, i32], i64
    lib.zt_stream_new.argtypes = [i32, u64, i64, i32, i32, i32, ctypes.POINTER(u64)]
    lib.zt_stream_free.argtypes = [u64]
    lib.zt_stream_adamw.argtypes = [u64, ranges, i64, hypers, i32, i32, i32, *([u64] * 6)]
    lib.zt_capability.argtypes = [i32]
    lib.zt_pin.argtypes = [u64, i64, i32]
    lib.zt_unpin.argtypes = [u64]
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
    """Whether the CUDA kernels can be called: built, and for every GPU that this process sees. Makes no context."""
    try:
        return int(cuda().zt_device_count()) > 0 and not too_old()
    except ImportError:
        return False


def too_old() -> dict[int, str]:
    """The GPUs for which the CUDA kernels are not built, with their compute capabilities.

    Raises:
        ImportError: the CUDA kernels are not built.
    """
    lib = cuda()
    found = {device: int(lib.zt_capability(device)) for device in range(max(0, int(lib.zt_device_count())))}
    oldest = int(lib.zt_oldest_capability())
    return {device: _capability(value) for device, value in found.items() if 0 < value < oldest}


def _capability(value: int) -> str:
    return f"{value // 10}.{value % 10}"


def isa(force: str = "") -> str | None:
    """The instruction set that would run: avx512, avx2, sve or generic.

    Args:
        force: its name; "": the environment's ZEROTOP_ISA, else the best one of this CPU.

    Returns:
        Its name, or None if it was not built or does not run on this CPU.
    """
    name: bytes | None = cpu().zt_isa(force.encode())
    return name.decode() if name else None


def cpu_status() -> str:
    """One line for the user: which CPU kernels run, or why none do."""
    try:
        chosen = isa()
    except ImportError as error:
        return f"not available: {error}"
    if chosen is None:
        return f"ZEROTOP_ISA={_env_isa()} does not run here; without it: {_best_isa()}"
    return f"{chosen}, up to {cpu().zt_max_threads()} threads"


def cuda_status() -> str:
    """One line for the user: whether the CUDA kernels are built, and how many GPUs they see."""
    try:
        count = cuda().zt_device_count()
    except ImportError as error:
        return f"not available: {error}"
    if old := too_old():
        named = ", ".join(f"cuda:{device} has {capability}" for device, capability in old.items())
        oldest = _capability(int(cuda().zt_oldest_capability()))
        return f"built for compute capability {oldest} and newer, but {named}: torch's own operations run instead"
    if count > 0:
        return f"built, {count} GPU{'s' if count > 1 else ''}"
    code, text = cuda_problem()
    return f"built, but CUDA doesn't start: error {code}, {text}" if code else "built, but no GPU or driver here"


def cuda_problem() -> tuple[int, str]:
    """The error with which CUDA refuses to start, as a cudaError_t and in CUDA's words; (0, "") if it starts, or where
    there is no driver or no GPU.

    Raises:
        ImportError: the CUDA kernels are not built.
    """
    code = max(0, -int(cuda().zt_device_count()))
    if code in (0, _NO_DEVICE) or (code == INSUFFICIENT_DRIVER and not _has_driver()):
        return 0, ""
    return code, cuda().zt_error(code).decode()


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def hyper(
    *, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, grad_scale: float, adamw: bool
) -> Hyper:
    """The constants of one step for the kernels, computed in double and rounded to fp32 once."""
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    return Hyper(
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


def check(name: str, t: torch.Tensor, n: int, dtypes: tuple[str, ...], device: str) -> None:
    """Raises ValueError unless `t` is a contiguous (n,) tensor of one of `dtypes` on a device of type `device`."""
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


def check_overlap(g: torch.Tensor, out: torch.Tensor) -> None:
    """Raises ValueError if `out` overlaps `g`, except element for element."""
    size = g.element_size()
    if g.data_ptr() == out.data_ptr() and size == out.element_size():
        return
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (g, out)), strict=True)
    if max(starts) < min(ends):
        raise ValueError("out overlaps g without being the same elements of it")


def raise_for(code: int, force: str) -> None:
    """Raise the error of a CPU kernel's return code. force: the instruction set of the call."""
    if code == -1:
        asked = f"isa={force!r}" if force else f"ZEROTOP_ISA={_env_isa()}"
        raise ValueError(f"{asked} was not built or does not run on this CPU; the best here is {_best_isa()}")
    if code:
        raise MemoryError("no memory for the partial sums")


def raise_for_cuda(code: int) -> None:
    """Raise RuntimeError for a CUDA error code."""
    if code:
        raise RuntimeError(f"CUDA: {cuda().zt_error(code).decode()} (error {code})")


def _env_isa() -> str:
    return os.environ.get("ZEROTOP_ISA", "")


def _best_isa() -> str:
    return next(name for name in ("avx512", "avx2", "sve", "generic") if isa(name))
