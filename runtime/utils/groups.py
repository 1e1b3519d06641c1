"""`deepspeed.utils.groups`: who shares what. All ranks are data-parallel, and the model is not split."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from runtime.config import ConfigError


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Accepted and not needed, as long as it asks for no expert parallelism."""
    if ep_size > 1:
        raise ConfigError(f"groups.initialize(ep_size={ep_size}): expected 1, for zerotop has no expert parallelism")


def get_data_parallel_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD


def get_data_parallel_world_size() -> int:
    return dist.get_world_size()


def get_data_parallel_rank() -> int:
    return dist.get_rank()


def get_model_parallel_world_size() -> int:
    return 1


def get_model_parallel_rank() -> int:
    return 0


# DeepSpeed has these with and without the underscore, and says sequence-data-parallel where no sequence is split, too.
_get_data_parallel_group = _get_sequence_data_parallel_group = get_data_parallel_group
_get_data_parallel_world_size = _get_sequence_data_parallel_world_size = get_data_parallel_world_size
_get_data_parallel_rank = _get_sequence_data_parallel_rank = get_data_parallel_rank
_get_model_parallel_world_size = get_tensor_model_parallel_world_size = get_model_parallel_world_size
_get_sequence_parallel_world_size = get_model_parallel_world_size
get_tensor_model_parallel_rank = _get_sequence_parallel_rank = get_model_parallel_rank
