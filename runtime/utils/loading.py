"""Helpers for building training loops and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch


class RepeatingLoader:
    """An endless iterator over a loader, which it restarts whenever it ends."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        """The next batch. Raises StopIteration only if the loader is empty."""
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class OnDevice:
    """Context in which new floating-point tensors are on `device` (default: meta, without memory) and of `dtype`. To
    train a model that does not fit in one rank's memory, build it under zero.Init() instead."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self.dtype, self.device, self.enabled = dtype, device, enabled
        self._inside = ExitStack()

    def __enter__(self) -> None:
        if self.enabled:
            self._inside.enter_context(torch.device(self.device))
            self._inside.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)

    def __exit__(self, *_error: Any) -> None:
        self._inside.close()


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Any], bool] | None = None) -> Any:
    """`item` with its tensors moved to `device`, inside lists, tuples and dictionaries, too. criterion_func: selects
    the tensors to move."""
    if isinstance(item, torch.Tensor):
        return item.to(device) if criterion_func is None or criterion_func(item) else item
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        moved = [move_to_device(value, device, criterion_func) for value in item]
        if hasattr(item, "_fields"):
            return type(item)(*moved)
        return type(item)(moved)
    return item
