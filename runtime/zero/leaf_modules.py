"""Leaf modules: what is below one is not cut into units. (set_z3_leaf_modules and its family: utils/leaf_modules.py)"""

from __future__ import annotations

from torch import nn

_MARK = "_z3_leaf"


def is_leaf_module(module: nn.Module) -> bool:
    """Whether set_z3_leaf_modules() named this module."""
    return bool(getattr(module, _MARK, False))


def mark_leaf_module(module: nn.Module, flag: bool) -> None:
    """From now on it counts as a leaf module, or no longer does."""
    setattr(module, _MARK, flag)
