"""Helpers of a script's own training loop, by their names in `deepspeed.runtime.utils`."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy
import torch
import torch.distributed as dist


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> torch.Tensor:
    """Clip `.grad` of parameters that no engine trains, in place, by the mean of the ranks' norms, which it returns: ()
    in fp32. Collective in a process group. (The engine clips by itself: gradient_clipping in the config.)

    mpu: ignored; there is no model parallelism.
    """
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [parameter.grad for parameter in given]
    total = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None], norm_type).float()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    torch.nn.utils.clip_grads_with_norm_(given, max_norm, total)
    return total


def set_random_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
