"""Finds the engine that owns a module or a parameter."""

from __future__ import annotations

import gc
import weakref
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.config import ConfigError
from runtime.models.names import plain_name
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


def check_unowned(module: nn.Module) -> None:
    """Raise ConfigError if a parameter of `module` is trained, or sharded, by the engine of another model."""
    for name, parameter in module.named_parameters():
        if owner_of(parameter) is not None:
            gc.collect()  # an engine that the script has dropped may still wait for the collector
        if (engine := owner_of(parameter)) is not None:
            raise ConfigError(
                f"parameter {plain_name(name)} is in the model of another engine "
                f"({type(engine.state.module).__name__}), and two engines can't train the same parameter. Make both "
                "models parts of one that one engine takes, or call destroy() on the other engine first"
            )


def owner_of(parameter: nn.Parameter) -> ModelOwner | None:
    """The engine that owns `parameter`, if any."""
    holder = full_model_of(parameter)
    if holder is None:
        return None
    alive = [engine for weak in _owners.values() if (engine := weak()) is not None]
    return next((engine for engine in alive if engine.state.full is holder[0]), None)
