"""When each unit's gradients are reduced: once hooks have seen all of them, in an order that is the same on all
ranks."""

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
from runtime.zero.parameter import mark_reduced, on_grad_read

log = logging.getLogger("runtime.engine")


class GradReducer:
    """Reduces the gradients of all flat parameter groups during a backward.

    `order` has the groups in the order in which their gradients are expected, the same on all ranks. From the second
    backward on it is the order in which they arrived on rank 0 in the first; groups without gradients come last, so
    that no other waits for them.

    [Note: gradients that arrive twice in one backward]
    Under re-entrant activation checkpointing every pass through a module is a backward of its own, so a module that is
    used twice gets its gradients twice. The first backward finds the units with such modules, on any rank, and reduces
    them a second time; from then on they are reduced once, when the backward is over.
    """

    def __init__(self, order: Sequence[FlatParamGroup], comm: Comm, script_begins: Callable[[], bool]) -> None:
        """script_begins: called for the first gradient of a backward that the engine did not start; returns whether it
        is a script's backward of this engine's model."""
        self.order: list[Gradients] = [flat.gradients for flat in order if flat.gradients is not None]
        self.comm, self.telemetry = comm, comm.telemetry
        self._sequence = list(range(len(self.order)))
        """Positions in `order`, in the order in which reductions are issued."""
        self._learned = False
        self._ready: dict[int, None] = {}  # in order of arrival
        self._next = 0
        self._in_flight: deque[Gradients] = deque()
        self._reducing = False
        self._arrivals = 0
        self._in_backward = False  # a backward of this engine is running
        self._is_boundary = False  # that backward is the boundary's
        self._warned_discarded = self._warned_grad_read = False
        self._script_begins = script_begins
        self._reduced_last: set[int] = set()
        """Positions of groups whose gradients arrive twice in a backward: see the note."""
        self._parameters = [parameter for flat in order for parameter in flat.members]
        for parameter in self._parameters:
            on_grad_read(parameter, self._grad_was_read)
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
            if not reducer._in_backward and not reducer._script_begins():
                reducer._discard(parameter)
                return
            reducer._arrive(position, index, parameter)

        return arrived

    def _arrive(self, position: int, index: int, parameter: nn.Parameter) -> None:
        gradients = self.order[position]
        self._arrivals += 1
        if self._reducing and gradients.was_reduced(index):
            self._reopen(position, gradients.layout.slots[index].name)
        if gradients.receive(index, parameter) and position not in self._reduced_last:
            self._ready[position] = None
            self._issue_ready()

    def _reopen(self, position: int, name: str) -> None:
        if self._learned:
            raise RuntimeError(
                f"{name} received a second gradient in one backward, which it did not in the first backward: a module "
                "is used several times under re-entrant activation checkpointing. Call torch.utils.checkpoint with "
                "use_reentrant=False"
            )
        gradients = self.order[position]
        while gradients in self._in_flight:
            self._finish_oldest()
        gradients.reopen()
        self._reduced_last.add(position)

    def _discard(self, parameter: nn.Parameter) -> None:
        """Discard a gradient from another engine's backward, whose loss depends on this engine's model (a GAN)."""
        parameter.grad = None
        if not self._warned_discarded and self.comm.rank == 0:
            log.warning(
                "gradients from another engine's backward(loss) were discarded (logged once): what that loss leaves "
                "here trains nothing, as zero_grad() would see to in plain torch"
            )
        self._warned_discarded = True

    def _grad_was_read(self) -> None:
        if self.comm.rank == 0 and not self._warned_grad_read:
            log.warning(
                "parameter.grad is None after backward (logged once): the gradients are in the engine's flat buffers, "
                "so torch.nn.utils.clip_grad_norm_ clips nothing. To clip, set gradient_clipping in the config; the "
                "norm is engine.get_global_grad_norm(), and deepspeed.utils.safe_get_full_grad(parameter) gives the "
                "full gradient"
            )
        self._warned_grad_read = True

    def detach(self) -> None:
        """Remove the hooks from the parameters: the engine gives the model up."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin_backward(self, reduce: bool, last: bool, factor: float = 1.0) -> None:
        """reduce: whether this backward's gradients are reduced (stages 2 and 3: always, else only the boundary's).
        last: whether it is the boundary's. factor: multiplies each gradient."""
        mark_reduced(self._parameters, False)
        self._ready.clear()
        self._next = self._arrivals = 0
        self._reducing, self._in_backward, self._is_boundary = reduce, True, last
        for gradients in self.order:
            gradients.begin_backward(reduce, last, factor)

    def _issue_ready(self) -> None:
        while self._reducing and self._next < len(self._sequence) and self._sequence[self._next] in self._ready:
            self._issue(self.order[self._sequence[self._next]])

    def _issue(self, gradients: Gradients) -> None:
        while len(self._in_flight) >= REDUCTIONS_IN_FLIGHT:
            self._finish_oldest()
        gradients.issue_reduce()
        self._in_flight.append(gradients)
        self._next += 1

    def _finish_oldest(self) -> None:
        with self.telemetry.span("reduce"):
            self._in_flight.popleft().finish_reduce()

    def end_backward(self) -> None:
        """Reduce what is left, with zeros for gradients that did not arrive, and wait for all reductions.

        Raises RuntimeError if no gradient arrived: the loss depends on none of the parameters.
        """
        self._in_backward = False
        if not self._arrivals:
            raise RuntimeError(
                "engine.backward(loss): no trained parameter received a gradient. The loss must come from this "
                "engine's model, with parameters that require a gradient and are in the optimizer"
            )
        if not self._reducing:
            return
        while self._next < len(self.order):
            self._issue(self.order[self._sequence[self._next]])
        while self._in_flight:
            self._finish_oldest()
        if not self._learned:
            self._learned = True
            self._learn_order()
        if self._is_boundary:
            mark_reduced(self._parameters, True)

    def _learn_order(self) -> None:
        """After the first backward: take over rank 0's order of arrival, and find the groups of the class's note."""
        rest = [position for position in self._sequence if position not in self._ready]
        found = self.comm.gather_objects(([*self._ready, *rest], sorted(self._reduced_last)))
        late = sorted({position for _, others in found for position in others})
        for position in late:
            self.order[position].keep_always_open()
            self._issue(self.order[position])
        while self._in_flight:
            self._finish_oldest()
        if late and self.comm.rank == 0:
            log.warning(
                f"{len(late)} units receive gradients several times in one backward (modules used several times under "
                "re-entrant activation checkpointing): their full gradients are kept until it is over. "
                "torch.utils.checkpoint with use_reentrant=False needs less memory"
            )
        self._reduced_last = set(late)
        self._sequence = [position for position in found[0][0] if position not in self._reduced_last] + late

    def abandon(self) -> None:
        """The backward has failed: gradients that still arrive are discarded."""
        self._in_backward = False

    def clear(self) -> None:
        """Discard all gradients: the optimizer step has used them, or they are not wanted."""
        mark_reduced(self._parameters, False)
        for gradients in self.order:
            gradients.clear()
