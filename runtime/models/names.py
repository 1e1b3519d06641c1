"""Names of parameters, buffers and modules without the prefixes of torch.compile.   (torch-free)"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")
_WRAPPER = "_orig_mod"
"""The component of a name that torch.compile's wrapper adds."""
_ADAPTER_PARTS = ("base_layer", "modules_to_save")
"""Components that peft's layers add to parameter names, in addition to those that begin with lora_."""


def plain_name(name: str) -> str:
    """`name` without torch.compile's wrappers, so that a model has the same names compiled or not."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER) if _WRAPPER in name else name


def plain_names(named: Mapping[str, _T]) -> dict[str, _T]:
    """`named` with plain names as keys, or unchanged if two names would become equal."""
    plain = {plain_name(name): value for name, value in named.items()}
    return plain if len(plain) == len(named) else dict(named)


def without_adapters(name: str) -> str:
    """The name that a parameter had before peft put adapters around its module."""
    parts = iter(name.split("."))
    kept = []
    for part in parts:
        if part == "modules_to_save":
            next(parts, None)  # the adapter's name
        elif part not in ("base_layer", "original_module"):
            kept.append(part)
    return ".".join(kept)


def has_adapters(names: Iterable[str]) -> bool:
    """Whether parameter names show that peft has modified the model."""
    return any(part in _ADAPTER_PARTS or part.startswith("lora_") for name in names for part in name.split("."))
