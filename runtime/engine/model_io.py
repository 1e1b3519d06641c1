"""Helpers of the engine's DeepSpeed methods that save, load and offload a model's weights and states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import on_rank_0
from runtime.checkpoint.format.reader import CheckpointReader
from runtime.comm import Comm
from runtime.config import ConfigError
from runtime.engine.release import ALL_CATEGORIES
from runtime.wire.messages import Category
from runtime.zero.full import FullModel

STATES: dict[str, Category] = {
    "optim_states": "optimizer",
    "hp_params": "masters",
    "lp_params": "parameters",
    "lp_grads": "gradients",
    "contiguous_grad_buffer": "gradients",
}
"""DeepSpeed's names for offload_states(include=...) -> our memory categories."""


def save(state_dict: dict[str, Any] | None, path: Path, comm: Comm) -> None:
    """Write rank 0's `state_dict` to `path`. Raises CheckpointError on every rank if that fails. Collective."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict, path)

    on_rank_0(comm, f"write {path}", write)


def load_with(load: Callable[..., Any], path: Path, full: FullModel) -> None:
    """Call load(src=, dst=) with the checkpoint's parameters and buffers by name, and the unsharded module; rank 0's
    result is broadcast. Collective."""
    reader = CheckpointReader(path)
    source = {stored.name: reader.read(stored, stored.dtype) for stored in reader.tensors}
    with full.unsharded(full.units, modifier_rank=0):
        load(src=source, dst=full.module)


def categories(include: Iterable[Any] | None, device: Any) -> Collection[Category]:
    """The categories that offload_states(include=, device=) moves. Raises ConfigError for unknown names or devices."""
    if str(getattr(device, "value", device)) != "cpu":
        raise ConfigError(f'engine.offload_states(device={device!r}): expected "cpu"')
    if include is None:
        return ALL_CATEGORIES
    names = [str(getattr(state, "value", state)) for state in include]
    if unknown := [name for name in names if name not in STATES]:
        raise ConfigError(f"engine.offload_states(include={unknown}): expected some of {', '.join(STATES)}")
    return {STATES[name] for name in names}
