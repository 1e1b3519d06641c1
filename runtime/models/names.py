"""Names of parameters, buffers and modules, as a model that is not compiled has them.   (torch-free)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

_T = TypeVar("_T")
_WRAPPER = "_orig_mod"
"""What torch.compile puts into paths, for the module that it wraps."""


def plain_name(name: str) -> str:
    """`name` without the wrappers of torch.compile: compiled or not, a model has the same names."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER) if _WRAPPER in name else name


def plain_names(named: Mapping[str, _T]) -> dict[str, _T]:
    """The same by plain names. A model may really have two names that differ in that alone: then all stay."""
    plain = {plain_name(name): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)
