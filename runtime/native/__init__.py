"""ctypes over the kernel libraries built from csrc/: libzt_cpu.so and libzt_cuda.so.

The formulas and their order of operations are in csrc/formula.h. `loading` finds the libraries, `host` calls the CPU
library and `gpu` the CUDA library.
"""

from runtime.native.gpu import (
    Range,
    StreamedAdamW,
    cuda_adamw,
    cuda_adamw_ranges,
    cuda_sums_of_squares,
    pin,
    sums_work,
    unpin,
)
from runtime.native.host import (
    Rounding,
    accumulate,
    adamw,
    copy_past_cache,
    post,
    sum_into,
    sum_of_squares,
    touch,
    wait,
)
from runtime.native.loading import (
    ABI,
    DTYPES,
    SUM_BLOCK,
    Hyper,
    available,
    cpu,
    cpu_status,
    cuda,
    cuda_available,
    cuda_problem,
    cuda_status,
    hyper,
    isa,
    too_old,
)

__all__ = [
    "ABI",
    "DTYPES",
    "SUM_BLOCK",
    "Hyper",
    "Range",
    "Rounding",
    "StreamedAdamW",
    "accumulate",
    "adamw",
    "available",
    "copy_past_cache",
    "cpu",
    "cpu_status",
    "cuda",
    "cuda_adamw",
    "cuda_adamw_ranges",
    "cuda_available",
    "cuda_problem",
    "cuda_status",
    "cuda_sums_of_squares",
    "hyper",
    "isa",
    "pin",
    "post",
    "sum_into",
    "sum_of_squares",
    "sums_work",
    "too_old",
    "touch",
    "unpin",
    "wait",
]
