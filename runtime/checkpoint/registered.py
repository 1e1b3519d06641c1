"""What a script gives to `engine.register_state()`, and where a loaded checkpoint's states for it wait."""

from __future__ import annotations

from collections.abc import ItemsView, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.checkpoint.format.manifest import CheckpointError
from runtime.host import rng

RESERVED = "zerotop:"
"""Begins the names of what the engine registers itself."""
DATA = RESERVED + "data"
"""The loader that initialize() returns."""


class Registered:
    """Objects with a state_dict(), of which rank 0's state is saved; and random number generators, of which every
    rank's is."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self.generators: dict[str, rng.Generator] = {}
        self._states: dict[str, Any] = {}
        self._generator_states: dict[str, Any] = {}
        """Of the loaded checkpoint, until the name is registered."""

    def items(self) -> ItemsView[str, Any]:
        """The objects."""
        return self._objects.items()

    def add(self, name: str, item: Any) -> None:
        """Also restores it where a checkpoint waits with its state. Raises TypeError for what has no state that could
        be saved, CheckpointError where a generator is of another kind than the checkpoint's."""
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

    def compare(self, generator_states: Mapping[str, Any]) -> None:
        """Raises CheckpointError where a registered generator could not take its state."""
        for name, generator in self.generators.items():
            if name in generator_states:
                _compare(name, generator, generator_states[name])

    def restore(self, states: Mapping[str, Any], generator_states: Mapping[str, Any]) -> None:
        """States of a checkpoint: for what is registered now, and for what will be."""
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
    """What a script gave to be saved, and what the loaded checkpoint held for it."""

    registered: Registered = field(default_factory=Registered)
    client_state: dict[str, Any] = field(default_factory=dict)
    """What save_checkpoint() was given last, or what the loaded checkpoint held: also keyboard checkpoints carry it."""
    last_checkpoint: Path | None = None
    """What the script saved or loaded last."""


def _compare(name: str, generator: rng.Generator, state: Mapping[str, Any]) -> None:
    if (kind := rng.kind_of(generator)) != state["kind"]:
        raise CheckpointError(
            f"register_state({name}=...): the checkpoint holds a {state['kind']}, this is a {kind}: make it as it was, "
            "or give it another name"
        )
    if wrong := rng.why_rejected(generator, state):
        raise CheckpointError(f"register_state({name}=...): the checkpoint's state is none of a {kind} ({wrong})")


def checked(name: str) -> str:
    """A name that a script chose. Raises ValueError for one that is the engine's."""
    if name.startswith(RESERVED):
        raise ValueError(f"register_state({name}=...): names that begin with {RESERVED!r} are the engine's own")
    return name
