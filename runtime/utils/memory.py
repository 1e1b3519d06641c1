"""`see_memory_usage`, which logs the memory in use; the screen shows it all the time, by category."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist

from runtime.utils import logger
from runtime.wire.sizes import format_size


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log the memory in use on rank 0; only if `force` is set, as in DeepSpeed."""
    if not force or (dist.is_initialized() and dist.get_rank() != 0):
        return
    parts = []
    if torch.cuda.is_available():
        parts += [
            f"GPU allocated {format_size(torch.cuda.memory_allocated())} "
            f"(peak {format_size(torch.cuda.max_memory_allocated())})",
            f"reserved {format_size(torch.cuda.memory_reserved())}",
        ]
        torch.cuda.reset_peak_memory_stats()
    host = psutil.virtual_memory()
    parts += [f"process {format_size(psutil.Process().memory_info().rss)}", f"host {host.percent:.0f}% used"]
    logger.info(f"{message}: {', '.join(parts)}")
