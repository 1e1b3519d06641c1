"""What a model is made of, and what a script has made of it since: resized, replaced and added modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from runtime.names import plain_name


class Structure:
    """Notices parameters that came into `module` after initialize(), at the cost of some comparisons."""

    def __init__(self, module: nn.Module, known: Collection[int]) -> None:
        """known: the ids of all parameters that an engine holds; it keeps them alive."""
        self._module, self._known = module, known
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._learn()

    def _learn(self) -> None:
        tables = [table for owner in self._module.modules() for table in (owner._modules, owner._parameters)]
        self._places = [(table, name, entry) for table in tables for name, entry in table.items()]
        self._sizes = [(table, len(table)) for table in tables]

    def new_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that require a gradient and are in no engine, by name."""
        same = all(table.get(name) is entry for table, name, entry in self._places)
        if same and all(len(table) == size for table, size in self._sizes):
            return []
        named = self._module.named_parameters()
        found = [(plain_name(n), p) for n, p in named if p.requires_grad and id(p) not in self._known]
        if not found:
            self._learn()
        return found
