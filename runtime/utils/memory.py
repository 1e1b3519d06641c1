"""One line about memory, where a script asks for it. The screen shows it all the time, by what it is used for."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist

from runtime.utils import logger
from runtime.wire.sizes import format_size


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log what this process holds, on rank 0, with `force` only, as in DeepSpeed."""
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
