"""Hooks that modules hold for an engine."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch


class EngineHook:
    """act(owner, *bound, *given) for as long as `owner` lives: torch keeps hooks where the garbage collector can't see
    that only they hold the engine.

    Copies and pickles of the module that holds it (an averaged model, torch.save) get one that does nothing: they are
    plain modules, no engine's.

    opaque: torch.compile runs it between its graphs. Otherwise compiled code leaves it out, which is right for modules
    inside a unit that has been taken care of when its own forward began.
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
    # torch.compiler.disable imports the compiler, 100 MB, for those who don't use it: so only once it is there.
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
    """What is left of a hook in a copy."""


def _plain() -> Callable[..., None]:
    return nothing
