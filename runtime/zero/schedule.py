"""When each unit's gradients are reduced: hooks notice that a unit is complete, and reductions are issued in one fixed
order on all ranks."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from torch import nn

from runtime.comm import Comm
from runtime.zero.flat import Flat
from runtime.zero.gradients import Gradients

log = logging.getLogger("runtime.engine")

IN_FLIGHT = 1
"""Reductions under way at once, beside the unit whose gradients are arriving. One more would hold one more whole unit's
buffer and overlap nothing more."""


class Schedule:
    """Drives the flats through a backward. `order`: the flats in the order in which their gradients are expected, equal
    on all ranks. After the first backward it is the order in which they came on rank 0; what did not come goes last, so
    that it holds up nobody."""

    def __init__(self, order: Sequence[Flat], comm: Comm) -> None:
        self.order: list[Gradients] = [flat.gradients for flat in order if flat.gradients is not None]
        self.comm, self.telemetry = comm, comm.telemetry
        self._sequence = list(range(len(self.order)))
        """Positions in `order`, as reductions are issued."""
        self._learned = False
        self._ready: dict[int, None] = {}  # in order of arrival
        self._next = 0
        self._flying: deque[Gradients] = deque()
        self._reducing = False
        self._arrivals = 0
        self._inside = False  # this engine's own backward is running
        self._told = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(position, index))
            for position, flat in enumerate(order)
            for index, parameter in enumerate(flat.members)
        ]

    def _hook(self, position: int, index: int) -> Callable[[nn.Parameter], None]:
        # Weak: torch keeps hooks where the garbage collector can't see that only they hold the engine.
        weak = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            schedule = weak()
            if schedule is None:
                return
            if not schedule._inside:
                schedule._drop(parameter)
                return
            schedule._arrivals += 1
            if schedule.order[position].receive(index, parameter):
                schedule._ready[position] = None
                schedule._issue_ready()

        return arrived

    def _drop(self, parameter: nn.Parameter) -> None:
        """A gradient of somebody else's backward: a loss that another engine's model computed with this one's (a GAN),
        or a plain loss.backward()."""
        parameter.grad = None
        if not self._told and self.comm.rank == 0:
            log.warning(
                "gradients that came outside this engine's own backward(loss) were dropped (told once): what another "
                "engine's loss leaves here trains nothing, as zero_grad() would see to in plain torch"
            )
        self._told = True

    def detach(self) -> None:
        """Take the hooks off the parameters: another engine takes over, or none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin_backward(self, reduce: bool, last: bool) -> None:
        """`reduce`: this backward's gradients go out to the other ranks (every one at stages 2 and 3, else only the
        boundary's). `last`: it is the boundary's."""
        self._ready.clear()
        self._next = self._arrivals = 0
        self._reducing, self._inside = reduce, True
        for gradients in self.order:
            gradients.begin_backward(reduce, last)

    def _issue_ready(self) -> None:
        while self._reducing and self._next < len(self._sequence) and self._sequence[self._next] in self._ready:
            self._issue(self.order[self._sequence[self._next]])

    def _issue(self, gradients: Gradients) -> None:
        while len(self._flying) >= IN_FLIGHT:
            self._finish_oldest()
        gradients.issue_reduce()
        self._flying.append(gradients)
        self._next += 1

    def _finish_oldest(self) -> None:
        with self.telemetry.span("reduce"):
            self._flying.popleft().finish_reduce()

    def end_backward(self) -> None:
        """Backward is over: what has not arrived counts as zero, and everything under way is waited for.

        Raises RuntimeError when nothing arrived at all: that loss depends on none of the parameters.
        """
        self._inside = False
        if not self._arrivals:
            raise RuntimeError(
                "engine.backward(loss): no trained parameter received a gradient. The loss must come from this "
                "engine's model, with parameters that require a gradient and are in the optimizer"
            )
        if not self._reducing:
            return
        while self._next < len(self.order):
            self._issue(self.order[self._sequence[self._next]])
        while self._flying:
            self._finish_oldest()
        if not self._learned:
            self._learned = True
            rest = [position for position in self._sequence if position not in self._ready]
            self._sequence = self.comm.broadcast_object([*self._ready, *rest])

    def abandon(self) -> None:
        """Backward failed: what still arrives belongs to nothing."""
        self._inside = False

    def clear(self) -> None:
        """The gradients were used, or are of no use."""
        for gradients in self.order:
            gradients.clear()
