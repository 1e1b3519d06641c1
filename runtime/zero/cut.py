"""Cut a model into units: the blocks of its largest repeated ModuleList, the embedding, the head, and the rest (the
root unit)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn


@dataclass
class Cut:
    """One unit to be: a name and the parameters that only it uses."""

    name: str
    modules: list[nn.Module]
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    everywhere: bool = False
    """The root unit and the small parameters: used, and open for gradients, all along."""


class UnitError(ValueError):
    """zerotop.units names modules that the model does not have."""


def cut(model: nn.Module, patterns: list[str] | None = None, small_below: int = 0) -> list[Cut]:
    """Units in forward order; every parameter of `model` is in exactly one of them, and units without parameters are
    left out.

    `patterns` (the config's zerotop.units) are module paths, `*` allowed: each matching module becomes a unit. A
    parameter that modules of several units use (tied weights) belongs to the root unit, which comes first.
    Parameters of fewer than `small_below` elements (the config's stage3_param_persistence_threshold) are set apart,
    second: stage 3 keeps them whole. They are at every stage, so that all stages add in the same order.
    """
    modules = dict(model.named_modules())
    if patterns:
        chosen = [name for name in modules if name and any(fnmatchcase(name, pattern) for pattern in patterns)]
        missing = [p for p in patterns if not any(fnmatchcase(name, p) for name in modules if name)]
        if missing:
            raise UnitError(
                f"zerotop.units: no module is called {', '.join(map(repr, missing))}; the model has "
                f"{', '.join(repr(name) for name in list(modules)[1:9])}..."
            )
        chosen = [name for name in chosen if not any(name.startswith(other + ".") for other in chosen)]
        cuts = [Cut(name, [modules[name]]) for name in chosen]
    else:
        cuts = _default_cut(model, modules)
    root = Cut("root", [model], everywhere=True)
    _share_out(model, root, cuts)
    small = Cut("small", [model], everywhere=True)
    for unit in (root, *cuts):
        small.parameters += [(name, p) for name, p in unit.parameters if p.numel() < small_below]
        unit.parameters = [(name, p) for name, p in unit.parameters if p.numel() >= small_below]
    return [unit for unit in (root, small, *cuts) if unit.parameters]


def _default_cut(model: nn.Module, modules: dict[str, nn.Module]) -> list[Cut]:
    lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 1}
    if not lists:
        return []
    blocks_name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    before, after = _around(model, blocks_name)
    blocks = [Cut(f"{blocks_name}.{index}", [block]) for index, block in enumerate(lists[blocks_name])]
    return [Cut("embedding", before), *blocks, Cut("head", after)]


def _around(model: nn.Module, blocks_name: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The siblings of the block list and of its ancestors: those registered before it run before it, as far as anyone
    can tell."""
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    at = model
    for part in blocks_name.split("."):
        earlier = True
        for name, child in at.named_children():
            if name == part:
                earlier = False
            else:
                (before if earlier else after).append(child)
        at = getattr(at, part)
    return before, after


def _share_out(model: nn.Module, root: Cut, cuts: list[Cut]) -> None:
    users: dict[nn.Parameter, set[int]] = {}
    for index, unit in enumerate(cuts):
        for module in unit.modules:
            for parameter in module.parameters():
                users.setdefault(parameter, set()).add(index)
    for name, parameter in model.named_parameters():  # each shared parameter appears once, under its first name
        owners = users.get(parameter, set())
        (cuts[next(iter(owners))] if len(owners) == 1 else root).parameters.append((name, parameter))


def reduce_order(units: list[Cut]) -> Iterator[int]:
    """Indices in the order in which gradients are expected to be complete: the head first, what is open all along
    last."""
    yield from (index for index in reversed(range(len(units))) if not units[index].everywhere)
    yield from (index for index, unit in enumerate(units) if unit.everywhere)
