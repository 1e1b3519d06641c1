"""`deepspeed.utils`, as far as training scripts name it: a logger, whose records the screen shows, and log_dist."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch.distributed as dist

logger = logging.getLogger("runtime.script")


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log on the given ranks only; ranks=[-1]: on all. Without ranks, as in DeepSpeed, only outside a process group."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    chosen = list(ranks or [])
    if rank == -1 or (chosen and (chosen[0] == -1 or rank in chosen)):
        logger.log(level, f"[Rank {rank}] {message}")
