"""DeepSpeed's calls for parameters that are used outside their module, and for generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from runtime.zero.full import GatheredParameters


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted and not needed: a parameter that another module uses is unsharded when it is read.

    Raises RuntimeError, as DeepSpeed does, if `parameter` is not an nn.Parameter.
    """
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(
            f"register_external_parameter(module, parameter): expected a torch.nn.Parameter, got "
            f"{type(parameter).__name__}"
        )


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Accepted and not needed, like register_external_parameter."""
    register_external_parameter(module, parameter)


class _Engine(Protocol):
    module: nn.Module


@contextmanager
def unwrap_model_for_generation(model: _Engine) -> Iterator[nn.Module]:
    """Yield the engine's model with all parameters unsharded, so that generate() all-gathers nothing for each token.
    Every rank must enter; at stage 3 the full model must fit on each device."""
    with GatheredParameters(model.module):
        yield model.module
