"""Which engine holds which model: finds a training state by its module or by a parameter."""

from __future__ import annotations

import weakref
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from runtime.checkpoint.snapshot import SnapshotGuard
from runtime.state.train_state import TrainState
from runtime.zero.full import full_model_of


class ModelOwner(Protocol):
    """An engine."""

    state: TrainState
    guard: SnapshotGuard

    def detach(self) -> None:
        """Let go of the model."""


_owners: WeakKeyDictionary[nn.Module, weakref.ref[ModelOwner]] = WeakKeyDictionary()
"""The engine that holds each module's parameters."""


def hold(module: nn.Module, engine: ModelOwner) -> None:
    """`engine` has taken the parameters of `module` over."""
    _owners[module] = weakref.ref(engine)


def release(module: nn.Module) -> None:
    """The engine that holds `module`, if there is one, lets go of it."""
    engine = _owners.pop(module, lambda: None)()
    if engine is not None:
        engine.detach()


def owner_of(parameter: nn.Parameter) -> ModelOwner | None:
    """The engine that holds `parameter`."""
    holder = full_model_of(parameter)
    if holder is None:
        return None
    alive = [engine for weak in _owners.values() if (engine := weak()) is not None]
    return next((engine for engine in alive if engine.state.full is holder[0]), None)
