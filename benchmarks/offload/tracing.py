"""Who did what when: our engine's threads, and a GPU's streams, watched from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Event(NamedTuple):
    lane: str  # "training" or "update"
    kind: str  # forward, backward, wait, update, gather, reduce, step
    name: str  # of the unit
    start_ns: int
    end_ns: int


class Trace:
    """Events since `clear`, of one engine."""

    def __init__(self, engine: Any) -> None:
        self.events: list[Event] = []
        self._training = threading.get_ident()
        self._forward: dict[str, int] = {}
        names = {id(unit): unit.name for unit in engine.state.units}
        for rule in engine.state.shard_optimizers:
            rule.update = self._timed(rule.update, "update", rule.flat.name.partition("/")[0])
        updates = engine.state.updates
        updates._wait_for_update = self._timed(
            updates._wait_for_update, "wait", lambda position: _unit(engine, position)
        )
        updates.launch = self._timed(updates.launch, "step", "")
        for unit in engine.state.units:
            for module in [] if unit.keep_unsharded else unit.modules:
                module.register_forward_pre_hook(self._begins(names[id(unit)]))
                module.register_forward_hook(self._ends(names[id(unit)]))
        engine.backward = self._timed(engine.backward, "backward", "")

    def clear(self) -> None:
        self.events.clear()

    def milliseconds(self, kind: str, lane: str | None = None) -> float:
        return sum(e.end_ns - e.start_ns for e in self.events if e.kind == kind and lane in (None, e.lane)) / 1e6

    def _lane(self) -> str:
        return "training" if threading.get_ident() == self._training else "update"

    def _timed(self, function: Callable[..., Any], kind: str, name: Any) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            began = time.monotonic_ns()
            try:
                return function(*given, **named)
            finally:
                text = name(*given) if callable(name) else name
                self.events.append(Event(self._lane(), kind, text, began, time.monotonic_ns()))

        return timed

    def _begins(self, name: str) -> Callable[..., None]:
        def hook(*_given: Any) -> None:
            self._forward[name] = time.monotonic_ns()

        return hook

    def _ends(self, name: str) -> Callable[..., None]:
        def hook(*_given: Any) -> None:
            if name in self._forward:
                began = self._forward.pop(name)
                self.events.append(Event(self._lane(), "forward", name, began, time.monotonic_ns()))

        return hook


def _unit(engine: Any, position: int) -> str:
    name: str = engine.state.shard_optimizers[position].flat.name
    return name.partition("/")[0]
