"""`deepspeed.utils.groups`: process groups. All ranks are data-parallel, and there is no model parallelism."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from runtime.config import ConfigError


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Does nothing. Raises ConfigError for expert parallelism."""
    if ep_size > 1:
        raise ConfigError(f"groups.initialize(ep_size={ep_size}): expected 1; zerotop has no expert parallelism")


def get_data_parallel_group() -> dist.ProcessGroup | None:
    """The group of all ranks."""
    return dist.group.WORLD


def get_data_parallel_world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size()


def get_data_parallel_rank() -> int:
    """This rank."""
    return dist.get_rank()


def get_model_parallel_world_size() -> int:
    """Always 1."""
    return 1


def get_model_parallel_rank() -> int:
    """Always 0."""
    return 0


# DeepSpeed's variants of these names, with an underscore and for sequence parallelism.
_get_data_parallel_group = _get_sequence_data_parallel_group = get_data_parallel_group
_get_data_parallel_world_size = _get_sequence_data_parallel_world_size = get_data_parallel_world_size
_get_data_parallel_rank = _get_sequence_data_parallel_rank = get_data_parallel_rank
_get_model_parallel_world_size = get_tensor_model_parallel_world_size = get_model_parallel_world_size
_get_sequence_parallel_world_size = get_model_parallel_world_size
get_tensor_model_parallel_rank = _get_sequence_parallel_rank = get_model_parallel_rank
