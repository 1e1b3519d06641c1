"""The random number states of one process: torch's, Python's, numpy's, and its GPU's; and those of generators that a
script makes and registers."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def is_generator(item: Any) -> bool:
    """Not the system's (random.SystemRandom), which has no state."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(item, kinds) and not isinstance(item, random.SystemRandom)


def get_state(generators: Mapping[str, Generator] | None = None) -> dict[str, Any]:
    """Plain data and tensors, as torch.load(weights_only=True) accepts. generators: those of the script, by name."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "generators": {name: state_of(generator) for name, generator in (generators or {}).items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_state(state: Mapping[str, Any]) -> None:
    """Not of the script's generators: those get theirs from `restore`."""
    torch.set_rng_state(state["torch"])
    _set_python(random, state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fault(state: Mapping[str, Any]) -> str:
    """What of a state that somebody else may have written could not be set; empty when nothing is. Nothing is set."""
    try:
        torch.Generator().set_state(state["torch"])
        _set_python(random.Random(), state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.RandomState(0).set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        for name, one in state.get("generators", {}).items():
            if not isinstance(name, str) or one.keys() != {"kind", "state"}:
                return f"generators: {name}"
    except Exception as error:  # torch, Python and numpy each have their own for it
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def state_of(generator: Generator) -> dict[str, Any]:
    """Its state and what kind of generator it is."""
    return {"kind": kind_of(generator), "state": _packed(_state(generator))}


def restore(generator: Generator, state: Mapping[str, Any]) -> None:
    """Take what `state_of` gave for a generator of the same kind."""
    value = _unpacked(state["state"])
    if isinstance(generator, torch.Generator):
        generator.set_state(value)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = value
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(value)
    else:
        _set_python(generator, value)


def refuses(generator: Generator, state: Mapping[str, Any]) -> str:
    """Why `generator` could not take the state, whoever wrote it; empty when it could. It stays as it is."""
    another = torch.Generator(generator.device) if isinstance(generator, torch.Generator) else copy.deepcopy(generator)
    try:
        restore(another, state)
    except Exception as error:  # torch, Python and numpy each have their own for it
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def kind_of(generator: Generator) -> str:
    if isinstance(generator, torch.Generator):
        return f"torch.Generator of a {generator.device.type} device"
    if isinstance(generator, np.random.Generator):
        return f"numpy.random.Generator of {type(generator.bit_generator).__name__}"
    if isinstance(generator, np.random.RandomState):
        return "numpy.random.RandomState"
    return f"random.{type(generator).__name__}"


def common_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of generators that all ranks of a checkpoint held alike, from `get_state` of each: they are one generator for
    all, and a rank that is new takes part. Of one rank alone nobody can tell: none."""
    if len(states) < 2:
        return {}
    first, *others = [state.get("generators", {}) for state in states]
    return {name: one for name, one in first.items() if all(_same(one, other.get(name)) for other in others)}


def _state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()


def _set_python(generator: Any, state: Any) -> None:
    version, keys, gauss = state
    generator.setstate((version, tuple(keys), gauss))


def _packed(value: Any) -> Any:
    """numpy's arrays and numbers, which torch.load(weights_only=True) refuses, as lists and Python's."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "array": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"dtype", "array"}:
        return np.array(value["array"], dtype=value["dtype"])
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    return value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return bool(one == other)
