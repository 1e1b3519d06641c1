"""`deepspeed.utils.set_z3_leaf_modules` and its family. DeepSpeed gathers what is below a leaf module at once, because
its hooks on single experts can't know which ones a rank uses. A unit is gathered whole here, and its experts with it;
what is below a leaf module is not cut into units, where that is said before the engine is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from runtime.zero.leaf_modules import is_leaf_module, mark_leaf_module

Wanted = type[nn.Module] | str


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether set_z3_leaf_modules() named this module."""
    return is_leaf_module(model)


def z3_leaf_parameter(parameter: nn.Parameter) -> bool:
    """Whether it belongs to a leaf module: never, for units are gathered whole."""
    return False


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    mark_leaf_module(model, flag)


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[Wanted], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """The modules of these classes (or class names), which count as leaf modules from now on. Raises ValueError where
    there are none, as DeepSpeed does."""
    return _mark(model, lambda _name, module: _is_one(module, leaf_module_classes), True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[Wanted], raise_if_not_found: bool = True
) -> list[nn.Module]:
    return _mark(model, lambda _name, module: _is_one(module, leaf_module_classes), False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """By their names in the model. Returns the modules, and the names that it does not have."""
    found = _mark(model, lambda name, _module: name in module_names, True, raise_if_not_found)
    there = {name for name, _ in model.named_modules()}
    return found, [name for name in module_names if name not in there]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """By the ends of their names. Returns the modules, and the suffixes that no name has."""
    names = [name for name, _ in model.named_modules()]
    found = _mark(model, lambda name, _module: _ends(name, module_name_suffixes), True, raise_if_not_found)
    return found, [suffix for suffix in module_name_suffixes if not any(_ends(name, [suffix]) for name in names)]


def _ends(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _is_one(module: nn.Module, wanted: Iterable[Wanted]) -> bool:
    kind = type(module)
    names = {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}
    return any(one in names if isinstance(one, str) else isinstance(module, one) for one in wanted)


def _mark(
    model: nn.Module, fits: Callable[[str, nn.Module], bool], flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if fits(name, module)]
    if not found and raise_if_not_found:
        raise ValueError(f"no module of {type(model).__name__} is one of the leaf modules that were named")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found
