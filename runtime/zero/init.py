"""zero.Init: builds a model that is too large for each rank to build in full."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from runtime.comm import init_distributed, objects
from runtime.config import ConfigError
from runtime.host import rng
from runtime.models.weights import Weights
from runtime.zero.absent import WEIGHTS_MARK, AbsentParameter
from runtime.zero.param_places import mark
from runtime.zero.partition_parameters import install_attributes


class _MetaDrawsNothing(TorchFunctionMode):
    """Makes in-place random draws into meta tensors return at once. torch does so too, but imports its compiler first
    (for normal_): 800 modules, 80 MB and seconds on every rank without values."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWS or getattr(function, "__module__", None) == _TRANSFORMERS_INIT:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return function(*args, **(kwargs or {}))


_DRAWS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (nn.init, ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")),  # those that call function modes
        (torch.Tensor, ("normal_", "uniform_", "log_normal_", "cauchy_")),
        (torch.Tensor, ("exponential_", "geometric_", "random_", "bernoulli_")),
        (torch.Tensor, ("erfinv_", "clamp_")),  # of trunc_normal_, in torch 2.11
    )
    for name in names
)


_TRANSFORMERS_INIT = "transformers.initialization"
"""Module whose functions transformers puts in the place of torch.nn.init's while it initialises a model; torch then
names them, not its own, to function modes. All of them fill their first argument."""


class Init:
    """Context in which modules are built without memory for their parameters, except on rank 0.

    weights   safetensors (a file, an index, a folder): parameters are made on the meta device on every rank, and
              initialize() reads each rank's shards from the files. Parameters that the files lack (a new head,
              adapters) are drawn by their module's reset_parameters(), as long as the files have most of the model
    (none)    rank 0 builds the model in host memory, the other ranks on the meta device, and initialize() distributes
              the shards. Afterwards all ranks have rank 0's random number states, as if each had built the model
    dtype     default dtype inside
    enabled   False does nothing

    DeepSpeed's other arguments (module, remote_device, pin_memory, config, mpu, ...) are accepted and not needed: the
    config of initialize() decides.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        *_deepspeed_only: Any,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        weights: str | Path | None = None,
        **_also_deepspeed_only: Any,
    ) -> None:
        self.enabled, self.dtype = enabled, dtype
        self.weights = Weights.open(weights) if weights is not None and enabled else None
        self._contexts: list[ExitStack] = []
        self._replaced = WeakTensorKeyDictionary()
        """Original parameter -> the AbsentParameter that replaces it, so that tied parameters stay tied."""

    def __enter__(self) -> Init:
        stack = ExitStack()
        self._contexts.append(stack)
        if not self.enabled:
            return self
        install_attributes()
        init_distributed()
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(_MetaDrawsNothing())
        if self.dtype is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
        hook: Callable[..., Any] = self._to_meta  # torch registers what it returns, although the annotation says None
        stack.callback(register_module_parameter_registration_hook(hook).remove)
        stack.callback(self._replaced.clear)
        return self

    def __exit__(self, kind: Any, *_rest: Any) -> None:
        self._contexts.pop().close()
        if self.enabled and kind is None and dist.get_world_size() > 1:
            if self.weights is None:
                _broadcast_rng_state()
            else:
                _check_same_weights(self.weights)

    def _to_meta(self, module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Move a parameter to the meta device when a module registers it, so that its initialisation does nothing.
        Buffers stay real, because nothing could recompute them."""
        if parameter is None:
            return None
        if self.weights is not None:
            module.__dict__[WEIGHTS_MARK] = str(self.weights.path)
        kept = self.weights is None and dist.get_rank() == 0 and not parameter.is_meta
        if kept or isinstance(parameter, AbsentParameter):
            mark(parameter, waiting=True)
            return parameter
        if parameter not in self._replaced:
            meta = torch.empty_like(parameter, device="meta")
            self._replaced[parameter] = AbsentParameter(meta, parameter.requires_grad)
            mark(self._replaced[parameter], waiting=True)
        return self._replaced[parameter]  # type: ignore[no-any-return]


def _broadcast_rng_state() -> None:
    """Give all ranks the random number states of rank 0, which alone has drawn initial values."""
    rng.set_state(_gather_over_gloo(rng.get_state())[0])


def _check_same_weights(weights: Weights) -> None:
    """Raise ConfigError on every rank unless all find the same tensors: otherwise they would hang in a broadcast."""
    found = _gather_over_gloo(weights.digest())
    for rank, digest in enumerate(found):
        if digest != found[0]:
            raise ConfigError(
                f"weights: the tensors that rank {rank} finds in {weights.path} differ from rank 0's; give all "
                "nodes the same files"
            )


def _gather_over_gloo(value: Any) -> list[Any]:
    """Every rank's `value`, over Gloo, because the model may be built before anything is on a GPU."""
    group = dist.new_group(backend="gloo")
    values = objects.gather(value, group)
    dist.destroy_process_group(group)
    return values
