"""The random number states of one process: torch's, Python's, numpy's, its GPU's, and those of generators that a script
has registered."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def is_generator(item: Any) -> bool:
    """Whether `item` is a random generator with a state; random.SystemRandom has none."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    return isinstance(item, kinds) and not isinstance(item, random.SystemRandom)


def get_state(generators: Mapping[str, Generator] | None = None) -> dict[str, Any]:
    """All states of this process as plain data and tensors, which torch.load(weights_only=True) accepts. generators:
    those that the script has registered, by name."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "generators": {name: state_of(generator) for name, generator in (generators or {}).items()},
    }
    if torch.cuda.is_initialized():  # a rank on the CPU makes no context on a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_state(state: Mapping[str, Any]) -> None:
    """Set the states of torch, Python, numpy and the GPU; `restore` sets those of the script's generators."""
    torch.set_rng_state(state["torch"])
    _set_python(random, state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def why_invalid(state: Mapping[str, Any]) -> str:
    """Why `state`, from an untrusted file, can't be set; "" if it can. Sets nothing."""
    try:
        torch.Generator().set_state(state["torch"])
        _set_python(random.Random(), state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.RandomState(0).set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        for name, one in state.get("generators", {}).items():
            if not isinstance(name, str) or one.keys() != {"kind", "state"}:
                return f"generators: {name}"
    except Exception as error:  # torch, Python and numpy raise different ones
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def state_of(generator: Generator) -> dict[str, Any]:
    """The kind and the state of `generator`, as plain data and tensors."""
    return {"kind": kind_of(generator), "state": _packed(_state(generator))}


def restore(generator: Generator, state: Mapping[str, Any]) -> None:
    """Set the state that `state_of` returned for a generator of the same kind."""
    value = _unpacked(state["state"])
    if isinstance(generator, torch.Generator):
        generator.set_state(value)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = value
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(value)
    else:
        _set_python(generator, value)


def why_rejected(generator: Generator, state: Mapping[str, Any]) -> str:
    """Why `state`, from an untrusted file, can't be set in `generator`; "" if it can. Sets nothing."""
    another = torch.Generator(generator.device) if isinstance(generator, torch.Generator) else copy.deepcopy(generator)
    try:
        restore(another, state)
    except Exception as error:  # torch, Python and numpy each have their own for it
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ""


def kind_of(generator: Generator) -> str:
    """The generator's kind, as checkpoints and messages name it."""
    if isinstance(generator, torch.Generator):
        return f"torch.Generator of a {generator.device.type} device"
    if isinstance(generator, np.random.Generator):
        return f"numpy.random.Generator of {type(generator.bit_generator).__name__}"
    if isinstance(generator, np.random.RandomState):
        return "numpy.random.RandomState"
    return f"random.{type(generator).__name__}"


def common_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of registered generators that are equal in all `states` (one per rank, from `get_state`): ranks that
    are new after a change of the world size get these. Empty for a single rank."""
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
    """`value` with lists and Python numbers instead of numpy's, which torch.load(weights_only=True) refuses."""
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
