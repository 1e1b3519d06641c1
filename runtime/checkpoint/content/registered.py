"""The objects of `engine.register_state()`, and the states of a loaded checkpoint for objects yet to be registered."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.checkpoint.format.manifest import CheckpointError
from runtime.host import rng

RESERVED = "zerotop:"
"""Prefix of the names under which the engine registers its own objects."""
DATA = RESERVED + "data"
"""Name of the data loader that initialize() returns."""


class Registered:
    """Objects with a state_dict(), whose state is saved from rank 0, and random number generators, whose state is saved
    from every rank."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self.generators: dict[str, rng.Generator] = {}
        self._states: dict[str, Any] = {}
        self._generator_states: dict[str, Any] = {}
        """States of the loaded checkpoint whose name has not been registered yet."""

    def items(self) -> ItemsView[str, Any]:
        """(name, object) of every registered object, generators excluded."""
        return self._objects.items()

    def add(self, name: str, item: Any) -> None:
        """Register `item`, and restore it if the loaded checkpoint has its state. Raises TypeError if it has no state
        to save, CheckpointError if a generator is of another kind than the checkpoint's."""
        if rng.is_generator(item):
            self._objects.pop(name, None)
            self.generators[name] = item
        elif hasattr(item, "state_dict") and hasattr(item, "load_state_dict"):
            self.generators.pop(name, None)
            self._objects[name] = item
        else:
            raise TypeError(
                f"register_state({name}=...): expected state_dict() and load_state_dict(), or a random number "
                f"generator of torch, numpy or Python; {type(item).__name__} is neither"
            )
        self._restore(name)

    def check(self, generator_states: Mapping[str, Any]) -> None:
        """Raise CheckpointError if a registered generator cannot take its saved state."""
        for name, generator in self.generators.items():
            if name in generator_states:
                _compare(name, generator, generator_states[name])

    def restore(self, states: Mapping[str, Any], generator_states: Mapping[str, Any]) -> None:
        """Restore everything that is registered, and keep the other states for later registrations."""
        self._states, self._generator_states = dict(states), dict(generator_states)
        for name in (*self._objects, *self.generators):
            self._restore(name)

    def _restore(self, name: str) -> None:
        if name in self.generators and name in self._generator_states:
            _compare(name, self.generators[name], self._generator_states[name])
            rng.restore(self.generators[name], self._generator_states.pop(name))
        elif name in self._objects and name in self._states:
            self._objects[name].load_state_dict(self._states.pop(name))


@dataclass
class ScriptState:
    """Everything that checkpoints hold for the script."""

    registered: Registered = field(default_factory=Registered)
    client_state: dict[str, Any] = field(default_factory=dict)
    """The latest client_state, from save_checkpoint() or a loaded checkpoint; keyboard checkpoints include it, too."""
    last_checkpoint: Path | None = None
    """The checkpoint that the script saved or loaded last."""


def _compare(name: str, generator: rng.Generator, state: Mapping[str, Any]) -> None:
    if (kind := rng.kind_of(generator)) != state["kind"]:
        raise CheckpointError(
            f"register_state({name}=...): the checkpoint holds a {state['kind']}, this is a {kind}: register the same "
            "kind of generator, or use another name"
        )
    if wrong := rng.why_rejected(generator, state):
        raise CheckpointError(f"register_state({name}=...): the checkpoint's state does not fit a {kind} ({wrong})")


def check_name(name: str) -> str:
    """`name`, chosen by a script. Raises ValueError if it is reserved for the engine."""
    if name.startswith(RESERVED):
        raise ValueError(f"register_state({name}=...): names that begin with {RESERVED!r} are reserved")
    return name
