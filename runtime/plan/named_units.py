"""Cuts a model into units as runtime/zero/cut.py does, from its parameters' names and shapes alone. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from runtime.config.presets import ModelError
from runtime.plan.constants import STACK_SHARE

_BEFORE = ("embed", "wte", "wpe", "tok_embeddings")
"""Parts of names of modules that run before the blocks."""
_AFTER = ("embed_out",)
"""Exceptions: GPT-NeoX's head."""


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the model as the engine sees it."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    also: str = ""
    """Its second name if two modules share it (a tied head); else empty."""

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)


class NamedUnit(NamedTuple):
    """One unit and its numbers of elements."""

    name: str
    trained: int
    frozen: int
    """Elements that are not trained."""


def cut_names(
    parameters: Sequence[Param], patterns: Sequence[str] | None = None, small_below: int = 0
) -> tuple[list[NamedUnit], tuple[str, ...]]:
    """The units in forward order, and the unit of each trained parameter in the order in which backward makes their
    gradients. `parameters` in forward order.

    patterns: the config's zerotop.units. small_below: parameters with fewer elements form the unit "small". Raises
    ModelError where no module has a name that a pattern matches.
    """
    unit_of = _chosen(parameters, patterns) if patterns else _default(parameters)
    sizes: dict[str, list[int]] = {name: [0, 0] for name in ("root", "small", *dict.fromkeys(unit_of.values()))}
    forward = []
    for one in parameters:
        owners = {owner for name in (one.name, one.also) if name and (owner := _owner(name, unit_of))}
        unit = owners.pop() if len(owners) == 1 else "root"
        unit = "small" if one.numel < small_below else unit
        sizes[unit][0 if one.trained else 1] += one.numel
        if one.trained:
            forward.append(unit)
    return [NamedUnit(name, *size) for name, size in sizes.items() if any(size)], tuple(reversed(forward))


def _owner(name: str, unit_of: dict[str, str]) -> str | None:
    return next((unit_of[path] for path in _paths(name) if path in unit_of), None)


def _paths(name: str) -> Iterator[str]:
    """Paths of the modules around the parameter `name`, outermost first."""
    parts = name.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _default(parameters: Sequence[Param]) -> dict[str, str]:
    """Path of a module -> its unit: the blocks of the largest lists, and what is before and after them."""
    stacks = _stacks(parameters)
    if not stacks:
        return {}
    largest = max(sum(blocks.values()) for blocks in stacks.values())
    found: dict[str, str] = {}
    for stack, blocks in stacks.items():
        if sum(blocks.values()) >= STACK_SHARE * largest:
            found |= {f"{stack}.{block}": f"{stack}.{block}" for block in blocks}
    names = [name for one in parameters for name in (one.name, one.also) if name]
    around = [name.rpartition(".")[0] for name in names if _owner(name, found) is None]
    before = {module: "embedding" for module in around if runs_before(module)}
    after = {module: "head" for module in around if module not in before}
    return before | found | after


def runs_before(module: str) -> bool:
    """Whether a module outside of the blocks is one that runs before them, by its name."""
    last = [part for part in module.split(".") if not part.isdigit()]
    return any(word in part for part in last for word in _BEFORE) and not any(part in _AFTER for part in last)


def _stacks(parameters: Sequence[Param]) -> dict[str, dict[int, int]]:
    """Path of each list of several modules, none inside another or a list of experts -> index -> elements."""
    found: dict[str, dict[int, int]] = {}
    for one in parameters:
        parts = one.name.split(".")
        for depth, part in enumerate(parts):
            if depth and part.isdigit() and "expert" not in parts[depth - 1].lower():
                blocks = found.setdefault(".".join(parts[:depth]), {})
                blocks[int(part)] = blocks.get(int(part), 0) + one.numel
                break
    return {stack: dict(sorted(blocks.items())) for stack, blocks in found.items() if len(blocks) > 1}


def _chosen(parameters: Sequence[Param], patterns: Sequence[str]) -> dict[str, str]:
    """The modules that `patterns` match, except those inside another match."""
    names = dict.fromkeys(path for one in parameters for name in (one.name, one.also) if name for path in _paths(name))
    missing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if missing:
        raise ModelError(
            f"zerotop.units: no module is called {', '.join(map(repr, missing))}; the model has "
            f"{', '.join(repr(name) for name in list(names)[:8])}..."
        )
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
