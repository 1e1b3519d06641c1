"""Which units' forwards leave the activations that backward needs, and how many bytes each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_NUMBER = re.compile(r"\d+")


class UnitActivations:
    """Measures from `begin` to `stop`."""

    def __init__(
        self,
        units: Iterable[tuple[str, list[nn.Module]]],
        activations: Callable[[], int | None],
        in_forward: Callable[[], bool] = lambda: True,
    ) -> None:
        """units: name and modules of each, none of which contains another's. activations: bytes beyond the ledger now;
        None if not known. in_forward: False while backward computes forwards again."""
        self._units, self._activations, self._in_forward = list(units), activations, in_forward
        self._hooks: list[RemovableHandle] = []
        self._before: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        """Most bytes that a forward of each unit has left for backward."""

    def begin(self) -> None:
        """Measure from now on."""
        for name, modules in self._units:
            for module in modules:
                self._hooks.append(module.register_forward_pre_hook(self._enter(name)))
                self._hooks.append(module.register_forward_hook(self._leave(name)))

    def stop(self) -> None:
        """Measure no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self._counts() and (now := self._activations()) is not None:
                self._before[name] = now

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            before = self._before.pop(name, None)
            if before is not None and (now := self._activations()) is not None:
                self.kept[name] = max(self.kept.get(name, 0), now - before)

        return hook

    def _counts(self) -> bool:
        return not torch.compiler.is_compiling() and self._in_forward()


def by_kind(kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Units whose names differ in numbers only, together: name with `*` for the numbers -> (how many, bytes of all)."""
    kinds: dict[str, tuple[int, int]] = {}
    for name, nbytes in kept.items():
        kind = _NUMBER.sub("*", name)
        count, total = kinds.get(kind, (0, 0))
        kinds[kind] = (count + 1, total + nbytes)
    return kinds
