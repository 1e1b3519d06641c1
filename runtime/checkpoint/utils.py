"""`deepspeed.checkpoint.utils`, as far as scripts name it."""

from __future__ import annotations

from typing import Any

import torch


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """`item` with every tensor in it replaced by a copy on `device`: parameters are views into flat memory, and
    torch.save would write all of that for each."""
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    if isinstance(item, (list, tuple)):
        return type(item)([clone_tensors_for_torch_save(value, device) for value in item])
    return item
