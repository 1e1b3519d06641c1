"""When each unit's gradients are reduced: hooks notice that a unit is complete, and reductions are issued in one fixed
order on all ranks."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from torch import nn

from runtime.comm import Comm
from runtime.plan.constants import REDUCTIONS_IN_FLIGHT
from runtime.zero.flat import FlatParamGroup
from runtime.zero.gradients import Gradients
from runtime.zero.parameter import mark_reduced, when_grad_is_read

log = logging.getLogger("runtime.engine")


class GradReducer:
    """Drives the flats through a backward. `order`: the flats in the order in which their gradients are expected, equal
    on all ranks. After the first backward it is the order in which they came on rank 0; what did not come goes last, so
    that it holds up nobody.

    [Note: gradients that arrive twice in one backward]
    Under re-entrant activation checkpointing every pass through a module is a backward of its own, so a module that is
    used twice gets its gradients twice. The first backward finds out which units that concerns, on any rank, and
    reduces them a second time; from then on they are reduced once, when the backward is over.
    """

    def __init__(self, order: Sequence[FlatParamGroup], comm: Comm, script_begins: Callable[[], bool]) -> None:
        """script_begins: called for the first gradient of a backward that the engine did not start; whether it is one
        of this engine's."""
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
        self._last = False  # it is the boundary's
        self._told = self._read = False
        self._script_begins = script_begins
        self._late: set[int] = set()
        """Positions whose gradients arrived again in this backward: see the note."""
        self._parameters = [parameter for flat in order for parameter in flat.members]
        for parameter in self._parameters:
            when_grad_is_read(parameter, self._grad_was_read)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(position, index))
            for position, flat in enumerate(order)
            for index, parameter in enumerate(flat.members)
        ]

    def _hook(self, position: int, index: int) -> Callable[[nn.Parameter], None]:
        # Weak: torch keeps hooks where the garbage collector can't see that only they hold the engine.
        weak = weakref.ref(self)

        def arrived(parameter: nn.Parameter) -> None:
            reducer = weak()
            if reducer is None:
                return
            if not reducer._inside and not reducer._script_begins():
                reducer._drop(parameter)
                return
            reducer._arrive(position, index, parameter)

        return arrived

    def _arrive(self, position: int, index: int, parameter: nn.Parameter) -> None:
        gradients = self.order[position]
        self._arrivals += 1
        if self._reducing and gradients.was_reduced(index):
            self._reopen(position, gradients.layout.slots[index].name)
        if gradients.receive(index, parameter) and position not in self._late:
            self._ready[position] = None
            self._issue_ready()

    def _reopen(self, position: int, name: str) -> None:
        if self._learned:
            raise RuntimeError(
                f"{name} received a second gradient in one backward, for the first time: a module that is used several "
                "times under re-entrant activation checkpointing does this, and has to from the first backward on. "
                "Call torch.utils.checkpoint with use_reentrant=False"
            )
        gradients = self.order[position]
        while gradients in self._flying:
            self._finish_oldest()
        gradients.reopen()
        self._late.add(position)

    def _drop(self, parameter: nn.Parameter) -> None:
        """A gradient of somebody else's backward: a loss that another engine's model computed with this one's (a
        GAN)."""
        parameter.grad = None
        if not self._told and self.comm.rank == 0:
            log.warning(
                "gradients from another engine's backward(loss) were discarded (logged once): what that loss leaves "
                "here trains nothing, as zero_grad() would see to in plain torch"
            )
        self._told = True

    def _grad_was_read(self) -> None:
        if self.comm.rank == 0 and not self._read:
            log.warning(
                "parameter.grad is None after backward (logged once): the gradients are in the engine's flat buffers, "
                "so torch.nn.utils.clip_grad_norm_ clips nothing. To clip, set gradient_clipping in the config; the "
                "norm is engine.get_global_grad_norm(), and deepspeed.utils.safe_get_full_grad(parameter) gives a "
                "whole gradient"
            )
        self._read = True

    def detach(self) -> None:
        """Take the hooks off the parameters: another engine takes over, or none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def inside(self) -> bool:
        """A backward of this engine is running, or has failed."""
        return self._inside

    def begin_backward(self, reduce: bool, last: bool, factor: float = 1.0) -> None:
        """`reduce`: this backward's gradients go out to the other ranks (every one at stages 2 and 3, else only the
        boundary's). `last`: it is the boundary's. `factor`: on each gradient."""
        mark_reduced(self._parameters, False)
        self._ready.clear()
        self._next = self._arrivals = 0
        self._reducing, self._inside, self._last = reduce, True, last
        for gradients in self.order:
            gradients.begin_backward(reduce, last, factor)

    def _issue_ready(self) -> None:
        while self._reducing and self._next < len(self._sequence) and self._sequence[self._next] in self._ready:
            self._issue(self.order[self._sequence[self._next]])

    def _issue(self, gradients: Gradients) -> None:
        while len(self._flying) >= REDUCTIONS_IN_FLIGHT:
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
            self._learn()
        if self._last:
            mark_reduced(self._parameters, True)

    def _learn(self) -> None:
        """See the class's text and note."""
        rest = [position for position in self._sequence if position not in self._ready]
        found = self.comm.gather_objects(([*self._ready, *rest], sorted(self._late)))
        late = sorted({position for _, others in found for position in others})
        for position in late:
            self.order[position].keep_open()
            self._issue(self.order[position])
        while self._flying:
            self._finish_oldest()
        if late and self.comm.rank == 0:
            log.warning(
                f"{len(late)} units receive gradients several times in one backward (modules used several times under "
                "re-entrant activation checkpointing): their gradients stay whole until it is over. "
                "torch.utils.checkpoint with use_reentrant=False needs less memory"
            )
        self._late = set(late)
        self._sequence = [position for position in found[0][0] if position not in self._late] + late

    def abandon(self) -> None:
        """Backward failed: what still arrives belongs to nothing."""
        self._inside = False

    def clear(self) -> None:
        """The gradients were used, or are of no use."""
        mark_reduced(self._parameters, False)
        for gradients in self.order:
            gradients.clear()
