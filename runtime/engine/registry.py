"""Finds the engine that owns a module or a parameter."""

from __future__ import annotations

import weakref
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.state.train_state import TrainState
from runtime.zero.full import full_model_of


class ModelOwner(Protocol):
    """The part of an engine that the registry uses."""

    state: TrainState
    guard: SnapshotGuard

    def detach(self) -> None:
        """Remove the engine's hooks and unshard the model."""


_owners: WeakKeyDictionary[nn.Module, weakref.ref[ModelOwner]] = WeakKeyDictionary()
"""Module -> the engine that owns its parameters."""


def register(module: nn.Module, engine: ModelOwner) -> None:
    """Register `engine` as the owner of the parameters of `module`."""
    _owners[module] = weakref.ref(engine)


def detach_owner(module: nn.Module) -> None:
    """Detach the engine that owns `module`, if there is one."""
    engine = _owners.pop(module, lambda: None)()
    if engine is not None:
        engine.detach()


def owner_of(parameter: nn.Parameter) -> ModelOwner | None:
    """The engine that owns `parameter`, if any."""
    holder = full_model_of(parameter)
    if holder is None:
        return None
    alive = [engine for weak in _owners.values() if (engine := weak()) is not None]
    return next((engine for engine in alive if engine.state.full is holder[0]), None)
