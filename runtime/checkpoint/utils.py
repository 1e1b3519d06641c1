"""`deepspeed.checkpoint.utils`: the part that training scripts use."""

from __future__ import annotations

from typing import Any

import torch


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of `item` with every tensor cloned to `device`. Parameters are views into flat buffers, and torch.save
    would write the whole buffer for each."""
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, dict):
        return type(item)({key: clone_tensors_for_torch_save(value, device) for key, value in item.items()})
    if isinstance(item, (list, tuple)):
        return type(item)([clone_tensors_for_torch_save(value, device) for value in item])
    return item
