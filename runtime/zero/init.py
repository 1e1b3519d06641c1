"""zero.Init: building a model that no rank could hold whole."""

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
from runtime.zero.absent import WEIGHTS_MARK, Absent
from runtime.zero.partition_parameters import install_attributes
from runtime.zero.places import mark


class _MetaDrawsNothing(TorchFunctionMode):
    """Draws into meta tensors return at once. torch does the same after importing its compiler (normal_ does): 800
    modules, 80 MB and seconds on every rank that has no values."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DRAWS:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return function(*args, **(kwargs or {}))


_DRAWS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (nn.init, ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")),  # those that torch asks modes about
        (torch.Tensor, ("normal_", "uniform_", "log_normal_", "cauchy_")),
        (torch.Tensor, ("exponential_", "geometric_", "random_", "bernoulli_")),
    )
    for name in names
)


class Init:
    """Modules built inside take memory on one rank at most, or, with `weights`, on none.

    weights   safetensors (a file, an index, a folder): parameters are made on the meta device, and initialize() reads
              only each rank's ranges. What the files lack (a new head, adapters) is drawn by its module's
              reset_parameters(), as long as they have most of the model's parameters
    without   rank 0 builds in host memory, the others' parameters are on the meta device; initialize() hands out the
              ranges. Afterwards all ranks have rank 0's random number states, as if all had built the model
    dtype     default dtype inside. enabled: False does nothing.

    DeepSpeed's other arguments (module, remote_device, pin_memory, config, mpu, ...) are accepted and not needed: the
    config says where things live.
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
        """Absent by the parameter in whose place it is, while that is around: it may be given to a second module."""

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
        hook: Callable[..., Any] = self._to_meta  # what it returns is registered instead; torch's annotation says None
        stack.callback(register_module_parameter_registration_hook(hook).remove)
        stack.callback(self._replaced.clear)
        return self

    def __exit__(self, kind: Any, *_rest: Any) -> None:
        self._contexts.pop().close()
        if self.enabled and kind is None and dist.get_world_size() > 1:
            if self.weights is None:
                _share_random_states()
            else:
                _same_files_everywhere(self.weights)

    def _to_meta(self, module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Drop a parameter's memory as soon as a module takes it; what initialises it next then does nothing. Buffers
        stay real: nobody else could compute them."""
        if parameter is None:
            return None
        if self.weights is not None:
            module.__dict__[WEIGHTS_MARK] = str(self.weights.path)
        kept = self.weights is None and dist.get_rank() == 0 and not parameter.is_meta
        if kept or isinstance(parameter, Absent):
            mark(parameter, waiting=True)
            return parameter
        if parameter not in self._replaced:
            there = torch.empty_like(parameter, device="meta")
            self._replaced[parameter] = Absent(there, parameter.requires_grad)
            mark(self._replaced[parameter], waiting=True)
        return self._replaced[parameter]  # type: ignore[no-any-return]


def _share_random_states() -> None:
    """Rank 0 drew the initial values, the others drew nothing: go on from the same numbers."""
    rng.set_state(_of_all_ranks(rng.get_state())[0])


def _same_files_everywhere(weights: Weights) -> None:
    """What one rank finds in its files and another one doesn't would leave them waiting for each other later."""
    found = _of_all_ranks(weights.digest())
    for rank, digest in enumerate(found):
        if digest != found[0]:
            raise ConfigError(f"weights: rank {rank} finds other tensors in {weights.path} than rank 0")


def _of_all_ranks(thing: Any) -> list[Any]:
    """Over Gloo: the model may be built before anything is on a GPU."""
    group = dist.new_group(backend="gloo")
    things = objects.gather(thing, group)
    dist.destroy_process_group(group)
    return things
