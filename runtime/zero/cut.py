"""Cuts a model into units: the blocks of its repeated ModuleLists, the embedding, the head, and the root unit, which
has the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from runtime.models.names import plain_name
from runtime.plan.constants import STACK_SHARE
from runtime.zero.leaf_modules import is_leaf_module


@dataclass
class Cut:
    """One unit before its buffers are made: its modules, and the parameters that no other unit uses."""

    name: str
    modules: list[nn.Module]
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    always_open: bool = False
    """Whether its gradients may arrive at any time in a backward: true of the root unit and the small parameters."""


class UnitError(ValueError):
    """The config's zerotop.units names modules that the model does not have."""


def cut(model: nn.Module, patterns: list[str] | None = None, small_below: int = 0) -> list[Cut]:
    """Return the units in forward order. Every parameter of `model` is in exactly one; empty units are left out.

    `patterns` (the config's zerotop.units) are module paths, `*` allowed: each matching module becomes a unit. A
    parameter that modules of several units use (tied weights), or that no module with a forward holds (one of a
    ParameterList), belongs to the root unit, which comes first.
    Parameters of fewer than `small_below` elements (the config's stage3_param_persistence_threshold) make the second
    unit, "small", which stage 3 keeps unsharded. It exists at every stage, so that all stages add in the same order.
    """
    modules = dict(model.named_modules())
    if patterns:
        plain = {name: plain_name(name) for name in modules if plain_name(name)}
        chosen = [name for name in plain if any(fnmatchcase(plain[name], pattern) for pattern in patterns)]
        missing = [p for p in patterns if not any(fnmatchcase(name, p) for name in plain.values())]
        if missing:
            raise UnitError(
                f"zerotop.units: no module is called {', '.join(map(repr, missing))}; the model has "
                f"{', '.join(repr(name) for name in list(plain.values())[:8])}..."
            )
        chosen = [name for name in chosen if not any(name.startswith(other + ".") for other in chosen)]
        cuts = [Cut(plain[name], [modules[name]]) for name in chosen]
    else:
        cuts = _default_cut(model, modules)
    root = Cut("root", [model], always_open=True)
    _assign_parameters(model, root, cuts)
    small = Cut("small", [model], always_open=True)
    for unit in (root, *cuts):
        small.parameters += [(name, p) for name, p in unit.parameters if p.numel() < small_below]
        unit.parameters = [(name, p) for name, p in unit.parameters if p.numel() >= small_below]
    return [unit for unit in (root, small, *cuts) if unit.parameters]


def _default_cut(model: nn.Module, modules: dict[str, nn.Module]) -> list[Cut]:
    # A Sequential counts as a list of blocks in models without a ModuleList.
    stacks = _stacks(modules, nn.ModuleList) or _stacks(modules, nn.Sequential)
    if not stacks:
        return []
    largest = max(stacks.values(), key=_numel)
    stacks = {name: stack for name, stack in stacks.items() if _numel(stack) >= STACK_SHARE * _numel(largest)}
    before, after = _around(model, list(stacks.values()), largest)
    blocks = [
        Cut(plain_name(f"{name}.{index}".lstrip(".")), list(_with_forward(block)))
        for name, stack in stacks.items()
        for index, block in enumerate(stack.children())
    ]
    return [Cut("embedding", before), *blocks, Cut("head", after)]


def _stacks(modules: dict[str, nn.Module], kind: type[nn.Module]) -> dict[str, nn.Module]:
    """Lists of several blocks, by path, in the model's order; none is inside another. Experts are not blocks: which of
    them run depends on the data and differs between ranks, while all ranks must unshard the same units. Nor is anything
    inside an expert, or below a leaf module (set_z3_leaf_modules)."""
    found: dict[str, nn.Module] = {}
    leaves = [name for name, module in modules.items() if is_leaf_module(module) or _are_experts(name, modules)]
    for name, module in modules.items():
        if any(leaf in ("", name) or name.startswith(leaf + ".") for leaf in leaves):
            continue
        several = isinstance(module, kind) and len(list(module.children())) > 1 and _numel(module) > 0
        if several and not any(outer == "" or name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def _are_experts(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module at the path `name` is a list of experts: it is called so, or there is a router beside it."""
    parent, _, own = name.rpartition(".")
    if "expert" in own.lower():
        return isinstance(modules[name], (nn.ModuleList, nn.Sequential))
    if not isinstance(modules[name], nn.ModuleList) or parent not in modules:
        return False
    return any(beside in ("gate", "gating") or "router" in beside for beside in modules[parent]._modules)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, or the modules inside it if it has no forward of its own (a ModuleDict)."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _with_forward(child)


def _around(model: nn.Module, stacks: list[nn.Module], largest: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules outside `stacks`, as (before, after). Modules that were registered before the largest stack are
    assumed to run before it."""
    inside = {id(part) for stack in stacks for part in stack.modules()}
    above = {id(module) for module in model.modules() if any(part in stacks for part in module.modules())}
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    side = before

    def visit(module: nn.Module) -> None:
        nonlocal side
        if module is largest:
            side = after
        if id(module) in inside:
            return
        if id(module) in above:
            for child in module.children():
                visit(child)
        else:
            side.extend(_with_forward(module))

    visit(model)
    return before, after


def _assign_parameters(model: nn.Module, root: Cut, cuts: list[Cut]) -> None:
    users: dict[nn.Parameter, set[int]] = {}
    for index, unit in enumerate(cuts):
        for module in unit.modules:
            for parameter in module.parameters():
                users.setdefault(parameter, set()).add(index)
    for name, parameter in model.named_parameters():  # each shared parameter appears once, under its first name
        owners = users.get(parameter, set())
        (cuts[next(iter(owners))] if len(owners) == 1 else root).parameters.append((plain_name(name), parameter))


def reduce_order(units: list[Cut]) -> Iterator[int]:
    """Indices of `units` in the order in which their gradients are expected to be complete: the head first, and last
    the units whose gradients may arrive at any time."""
    yield from (index for index in reversed(range(len(units))) if not units[index].always_open)
    yield from (index for index, unit in enumerate(units) if unit.always_open)
