"""GatheredParameters between zero.Init and the engine: rank 0 has built the values, the others hold none. Inside, every
rank has them.

Parameters whose values are in safetensors (zero.Init(weights=...)) stay without: no rank has read them yet.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from runtime.comm import objects
from runtime.zero.param_places import set_present, swap

log = logging.getLogger("runtime.setup")


@contextmanager
def present(parameters: Sequence[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
    """`parameters`: the same ones on every rank, all of them built under zero.Init and in no engine yet. What
    `modifier_rank` has changed is rank 0's afterwards."""
    alone = dist.get_world_size() == 1
    group = None if alone or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    there = [not parameter.is_meta for parameter in parameters]
    had = there if alone else objects.gather(there, group)[0]
    found = [parameter for parameter, has in zip(parameters, had, strict=True) if has]
    absent: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in [] if alone else found:
        values = _on_host(parameter) if dist.get_rank() == 0 else torch.empty_like(parameter, device="cpu")
        dist.broadcast(values, 0, group)
        if parameter.is_meta:
            absent[parameter] = nn.Parameter(values, parameter.requires_grad)
            swap(parameter, absent[parameter])
        elif dist.get_rank() != 0:
            parameter.data.copy_(values)
    for parameter in found:
        set_present(parameter, True)
    try:
        yield
        for parameter in found if modifier_rank else []:
            values = _on_host(parameter)
            dist.broadcast(values, modifier_rank, group)
            if dist.get_rank() == 0:
                parameter.data.copy_(values)
    finally:
        for parameter in found:
            set_present(parameter, False)
        for parameter, instead in absent.items():
            try:
                swap(parameter, instead)
            except RuntimeError:  # a graph of the script still refers to it: it stays, and takes memory here
                log.debug("a parameter keeps its values until the engine takes it")
        if group is not None:
            dist.destroy_process_group(group)


def _on_host(parameter: nn.Parameter) -> torch.Tensor:
    """Its memory itself where that is on the host."""
    return parameter.detach().cpu().contiguous()
