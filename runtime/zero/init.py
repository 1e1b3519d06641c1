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

from runtime.zero.weights import Weights

WEIGHTS_MARK = "_zerotop_weights"
"""Attribute of a meta parameter whose values a safetensors file has."""


class Init:
    """Modules built inside take memory on one rank at most, or, with `weights`, on none.

    weights   safetensors (a file, an index, a folder): parameters are made on the meta device, and initialize() reads
              only each rank's ranges
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

    def __enter__(self) -> Init:
        stack = ExitStack()
        self._contexts.append(stack)
        if not self.enabled:
            return self
        from runtime.api import init_distributed

        init_distributed()
        stack.enter_context(torch.device("cpu"))
        if self.dtype is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self.dtype)
        hook: Callable[..., Any] = self._to_meta  # what it returns is registered instead; torch's annotation says None
        if self.weights is not None or dist.get_rank() != 0:
            stack.callback(register_module_parameter_registration_hook(hook).remove)
        return self

    def __exit__(self, kind: Any, *_rest: Any) -> None:
        self._contexts.pop().close()
        if self.enabled and kind is None and self.weights is None and dist.get_world_size() > 1:
            _share_random_states()

    def _to_meta(self, _module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Drop a parameter's memory as soon as a module takes it; what initialises it next then does nothing. Buffers
        stay real: nobody else could compute them."""
        if parameter is None or parameter.is_meta:
            return parameter
        replacement = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        if self.weights is not None:
            setattr(replacement, WEIGHTS_MARK, self.weights)
        return replacement


def _share_random_states() -> None:
    """Rank 0 drew the initial values, the others drew nothing: go on from the same numbers."""
    from runtime.checkpoint import rng

    group = dist.new_group(backend="gloo")
    box = [rng.get_state() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    state = box[0]
    assert state is not None
    rng.set_state(state)
    dist.destroy_process_group(group)
