"""Calls of deepspeed.zero around modules that use parameters of others, and around generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from runtime.zero.full import GatheredParameters


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted and not needed: parameters that a module uses without owning them are noticed when they are read.

    Raises RuntimeError for what is no parameter, as DeepSpeed does: it would be registered in vain there.
    """
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(
            f"register_external_parameter(module, parameter): expected a torch.nn.Parameter, got "
            f"{type(parameter).__name__}"
        )


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """See register_external_parameter."""
    register_external_parameter(module, parameter)


class _Engine(Protocol):
    module: nn.Module


@contextmanager
def unwrap_model_for_generation(model: _Engine) -> Iterator[nn.Module]:
    """Inside, the engine's model with all parameters whole, for generate() without a gather for each token; every rank
    must enter. At stage 3 it must fit each device."""
    with GatheredParameters(model.module):
        yield model.module
