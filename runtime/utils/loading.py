"""Small things that scripts build loops and models with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch


class RepeatingLoader:
    """A loader that begins anew when it ends: `next()` for as long as training takes."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.data_iter: Iterator[Any] = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        """Raises StopIteration only where the loader has nothing at all."""
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)


class OnDevice:
    """Inside, floating tensors are made on `device` (default: meta, without memory) and in `dtype`. To train a model
    that no rank can hold whole, build it under zero.Init() instead."""

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
    """`item` with its tensors on `device`, in lists, tuples and dictionaries too; where criterion_func is given, only
    those for which it is true."""
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
