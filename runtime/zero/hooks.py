"""Module hooks that do not keep their engine alive."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch


class EngineHook:
    """A hook that calls act(owner, *bound, *given) while `owner` lives. It refers to `owner` weakly, because torch
    keeps hooks where the garbage collector can't see that only they refer to the engine.

    Copies and pickles of the hooked module (an averaged model, torch.save) get a hook that does nothing, because they
    belong to no engine.

    opaque: torch.compile breaks its graph to run the hook. Otherwise compiled code leaves it out, which is right for
    modules inside a unit whose own forward hook has run.
    """

    def __init__(self, owner: Any, act: Callable[..., Any], *bound: Any, opaque: bool = True) -> None:
        self._owner, self._act, self._bound = weakref.ref(owner), act, bound
        self._opaque = opaque

    def __call__(self, *given: Any) -> None:
        if self._opaque or not torch.compiler.is_compiling():
            _call(self, given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _plain, ()


def _call(hook: EngineHook, given: tuple[Any, ...]) -> None:
    # torch.compiler.disable would import the compiler (100 MB): call it only when the script has imported that.
    global _uncompiled
    if _uncompiled is None and "torch._dynamo" in sys.modules:
        _uncompiled = torch.compiler.disable(_act)
    (_uncompiled or _act)(hook, given)


_call._torchdynamo_disable = True  # type: ignore[attr-defined]
_uncompiled: Callable[[EngineHook, tuple[Any, ...]], None] | None = None


def _act(hook: EngineHook, given: tuple[Any, ...]) -> None:
    owner = hook._owner()
    if owner is not None:
        hook._act(owner, *hook._bound, *given)


def nothing(*_given: Any) -> None:
    """Replaces an EngineHook in copies and pickles of its module."""


def _plain() -> Callable[..., None]:
    return nothing
