"""When each unit's gradients are reduced: hooks notice that a unit is complete, and reductions are issued in one fixed
order on all ranks."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence

from torch import nn

from runtime.telemetry import NullTelemetry, Telemetry
from runtime.zero.unit import Flat

IN_FLIGHT = 2
"""Reductions under way at once. A third would hold one more whole unit's buffer and overlap nothing more."""


class Schedule:
    """Drives the flats through a backward. `order`: the flats in the order in which their reductions are issued, equal
    on all ranks."""

    def __init__(self, order: Sequence[Flat], telemetry: Telemetry | NullTelemetry) -> None:
        self.order = list(order)
        self.telemetry = telemetry
        self._ready: set[int] = set()
        self._next = 0
        self._flying: deque[Flat] = deque()
        self._reducing = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(position, index))
            for position, flat in enumerate(self.order)
            for index, parameter in enumerate(flat.members)
        ]

    def _hook(self, position: int, index: int) -> Callable[[nn.Parameter], None]:
        # Weak: torch keeps hooks where the garbage collector can't see that only they hold the engine.
        weak = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            schedule = weak()
            if schedule is not None and schedule.order[position].receive(index, parameter):
                schedule._ready.add(position)
                schedule._issue_ready()

        return arrived

    def detach(self) -> None:
        """Take the hooks off the parameters: another engine takes over, or none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin_backward(self, reduce: bool) -> None:
        """`reduce`: this backward's gradients go out to the other ranks (every one at stages 2 and 3, else only the
        boundary's)."""
        self._ready.clear()
        self._next = 0
        self._reducing = reduce
        for flat in self.order:
            flat.begin_backward()

    def _issue_ready(self) -> None:
        while self._reducing and self._next in self._ready:
            self._issue(self.order[self._next])

    def _issue(self, flat: Flat) -> None:
        while len(self._flying) >= IN_FLIGHT:
            self._finish_oldest()
        flat.issue_reduce()
        self._flying.append(flat)
        self._next += 1

    def _finish_oldest(self) -> None:
        with self.telemetry.span("reduce"):
            self._flying.popleft().finish_reduce()

    def end_backward(self) -> None:
        """Backward is over: what has not arrived counts as zero, and everything under way is waited for."""
        if not self._reducing:
            return
        while self._next < len(self.order):
            self._issue(self.order[self._next])
        while self._flying:
            self._finish_oldest()
