"""ctypes over the two kernel libraries built from csrc/: libzt_cpu.so and libzt_cuda.so.

The formulas and their order of operations stand in csrc/formula.h. `loading` finds the libraries, `host` calls the
CPU's and `gpu` the CUDA one.
"""

from runtime.native.gpu import cuda_adamw, cuda_sum_of_squares
from runtime.native.host import accumulate, adamw, post, sum_into, sum_of_squares, wait
from runtime.native.loading import (
    ABI,
    SUM_BLOCK,
    available,
    cpu,
    cpu_status,
    cuda,
    cuda_status,
    hyper,
    isa,
)

__all__ = [
    "ABI",
    "SUM_BLOCK",
    "accumulate",
    "adamw",
    "available",
    "cpu",
    "cpu_status",
    "cuda",
    "cuda_adamw",
    "cuda_status",
    "cuda_sum_of_squares",
    "hyper",
    "isa",
    "post",
    "sum_into",
    "sum_of_squares",
    "wait",
]
