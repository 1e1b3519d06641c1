"""`deepspeed.moe.utils` for models without DeepSpeed's MoE layers: scripts call it whether a model has any or not."""

from __future__ import annotations

from typing import Any

from torch import nn

Group = dict[str, Any]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Group | tuple[Group, ...] | list[Group], max_group_size: float | None = None
) -> list[Group]:
    """The groups as they are, in a list. max_group_size: ignored; it limits groups of experts."""
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)


def is_moe_param(param: nn.Parameter) -> bool:
    """Always False: experts are sharded as any other parameter."""
    return False


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(whether there are DeepSpeed's MoE layers, the number of their experts): always (False, 0)."""
    return False, 0
