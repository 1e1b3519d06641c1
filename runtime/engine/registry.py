"""Which engine holds which model: what finds an engine by its module or by a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from runtime.zero.full import home_of

if TYPE_CHECKING:
    from runtime.engine import Engine

_engines: WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = WeakKeyDictionary()
"""The engine that holds each module's parameters."""


_under_way: set[Engine] = set()
"""Engines of which an update is under way: a script that has only the module left must find it complete."""


def hold(module: nn.Module, engine: Engine) -> None:
    _engines[module] = weakref.ref(engine)


def release(module: nn.Module) -> None:
    """An engine that holds `module` lets go of it: another takes over, or none."""
    engine = _engines.pop(module, lambda: None)()
    if engine is not None:
        engine.detach()


def engine_of(parameter: nn.Parameter) -> Engine | None:
    """The engine that holds `parameter`."""
    home = home_of(parameter)
    alive = [engine for weak in _engines.values() if (engine := weak()) is not None]
    return next((engine for engine in alive if home is not None and engine.whole is home[0]), None)


def keep_until_complete(engine: Engine) -> None:
    """An update of it is under way."""
    _under_way.add(engine)


def complete(engine: Engine) -> None:
    _under_way.discard(engine)


def when_alive(engine: Engine, act: Callable[[Engine], None]) -> Callable[[], None]:
    """act(engine), for those whom the engine must not be kept alive by."""
    weak = weakref.ref(engine)

    def call() -> None:
        if (alive := weak()) is not None:
            act(alive)

    return call
