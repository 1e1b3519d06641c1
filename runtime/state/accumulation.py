"""The gradient accumulation of one engine: its state, its sums of losses, and the calls that are illegal in it."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class AccumulationState(enum.Enum):
    """State of an engine between two boundaries. (FSDP2's TrainingState plays the same role.)"""

    BOUNDARY = "between two optimizer steps; no gradient is held"
    BACKWARD = "a backward is running"
    BACKWARD_DONE = "a backward has ended, and no step() has taken its micro-step yet"
    ACCUMULATING = "step() has ended a micro-step that was not the accumulation's last"
    FAILED = "a backward ended with an exception, so the gradients of this rank are incomplete"


class IllegalCall(RuntimeError, AssertionError):
    """A call that the accumulation does not allow now. DeepSpeed has AssertionError for these, which scripts catch."""


class Accumulation:
    """Counts micro-steps, sums up their losses, and refuses calls in the wrong order."""

    def __init__(self, trains: bool, managed: bool = True) -> None:
        """trains: False for an engine without an optimizer, which refuses backward() and step(). managed: False if
        every step() ends an accumulation, whatever the number of backwards."""
        self.trains, self._managed = trains, managed
        self.state = AccumulationState.BOUNDARY
        self.micro_steps = 0
        """Micro-steps so far, over all accumulations."""
        self.start = 0
        """Micro-step at which the current accumulation steps began to count: set_train_batch_size() changes their
        number."""
        self._forced_boundary: bool | None = None if managed else True
        """Last value given to set_gradient_accumulation_boundary(); None: boundaries follow from counting."""
        self.syncs = True
        """Whether backwards may reduce gradients: False inside no_sync()."""
        self.script_ran_backward = False
        """Whether the last backward was the script's own loss.backward() and step() has not followed yet."""
        self.loss_is_scaled = False
        """Whether scale() was called for the script's next loss.backward()."""
        self.tokens = 0
        """Tokens of this rank's micro-batches since the last boundary."""
        self._backwards = 0
        """Backwards since the last boundary."""
        self._synced_backwards = 0
        """Backwards outside no_sync() since the last step()."""
        self._reduced_for_boundary: bool | None = None
        """Whether the last backward treated its micro-step as the accumulation's last."""
        self._loss_sum: torch.Tensor | float = 0.0
        self._losses = 0
        self._failure = ""

    # ---- state -----------------------------------------------------------------------------------------------------
    def is_boundary(self, accumulation_steps: int) -> bool:
        """Whether the micro-step under way is the accumulation's last."""
        if self._forced_boundary is not None:
            return self._forced_boundary
        return (self.micro_steps - self.start + 1) % accumulation_steps == 0

    def micro_step(self, accumulation_steps: int) -> int:
        """The micro-step under way, from 1 to `accumulation_steps`."""
        return min(self._backwards + 1, accumulation_steps)

    @property
    def in_progress(self) -> bool:
        """Whether gradients have arrived since the last boundary."""
        return self._backwards > 0

    @property
    def reduced_at_boundary(self) -> bool:
        """Whether the last backward reduced its gradients as the accumulation's last."""
        return bool(self._reduced_for_boundary)

    @property
    def loss(self) -> torch.Tensor | float | None:
        """() mean loss of this rank's backwards since the last boundary; None if the script ran them on losses that the
        engine has not seen."""
        return self._loss_sum / self._losses if self._losses else None

    def force_boundary(self, is_boundary: bool) -> None:
        """From now on micro-steps are the accumulation's last, or not, until the next call. Raises IllegalCall if every
        step() ends an accumulation."""
        if not self._managed:
            raise IllegalCall(
                "engine.set_gradient_accumulation_boundary(): with managed_gradient_accumulation false in the config "
                "every engine.step() is a boundary; leave out the call, or the key"
            )
        self._forced_boundary = is_boundary

    # ---- transitions -----------------------------------------------------------------------------------------------
    def begin_backward(self) -> None:
        """A backward begins."""
        self.state = AccumulationState.BACKWARD

    def end_backward(self, loss: torch.Tensor | None, accumulation_steps: int, by_script: bool = False) -> None:
        """A backward has ended. loss: () the unscaled loss, if it is known."""
        if loss is not None:
            self._loss_sum = self._loss_sum + loss.detach().double()
            self._losses += 1
        self._backwards += 1
        self._synced_backwards += self.syncs
        self.script_ran_backward, self.loss_is_scaled = by_script, False
        self._reduced_for_boundary = self.is_boundary(accumulation_steps)
        self.state = AccumulationState.BACKWARD_DONE

    def fail(self, what: str) -> None:
        """A backward has ended with an exception. what: the beginning of the error message of later calls."""
        self.state, self._failure = AccumulationState.FAILED, what

    def end_micro_step(self) -> None:
        """step() ends a micro-step; if every step() is a boundary, all backwards before it are micro-steps."""
        self.micro_steps += 1 if self._managed else self._backwards
        self._synced_backwards, self.script_ran_backward = 0, False
        self.state = AccumulationState.ACCUMULATING

    def end_step(self) -> None:
        """The boundary's optimizer step has ended."""
        self._loss_sum, self._losses, self.tokens, self._backwards = 0.0, 0, 0, 0
        self.state = AccumulationState.BOUNDARY

    def restart(self) -> None:
        """Discard what has been accumulated and begin an accumulation: checkpoints are taken at boundaries."""
        self._synced_backwards, self.script_ran_backward = 0, False
        self.start = self.micro_steps
        self.end_step()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backwards only accumulate gradients on this rank."""
        if not self.syncs:
            raise IllegalCall(
                "engine.no_sync() inside engine.no_sync(): the end of the inner one would end the outer one; enter it "
                "once around all backwards that only accumulate"
            )
        self.syncs = False
        try:
            yield
        finally:
            self.syncs = True

    # ---- calls in the wrong order ----------------------------------------------------------------------------------
    def check_can_train(self, call: str) -> None:
        """Raises IllegalCall if the engine has no optimizer. call: the method that needs one."""
        if not self.trains:
            raise IllegalCall(
                f"engine.{call}: this engine was made without an optimizer, for evaluation; to train, add an "
                '"optimizer" section to the config or call initialize(optimizer=...)'
            )

    def check_not_failed(self, step: int) -> None:
        """Raises IllegalCall after a backward that ended with an exception. step: the current optimizer step."""
        if self.state is AccumulationState.BACKWARD:  # a script's own backward that did not end
            self.fail(f"loss.backward() at step {step} ended with an exception")
        if self.state is AccumulationState.FAILED:
            raise IllegalCall(
                f"{self._failure}: the gradients of that backward are incomplete on this rank, and the collectives of "
                "the ranks may no longer match. Restart all ranks from the newest checkpoint"
            )

    def check_step(self, accumulation_steps: int) -> bool:
        """Raises IllegalCall if engine.step() is illegal now. Returns whether the step ends the accumulation."""
        if not self.syncs:
            raise IllegalCall(
                "engine.step() inside engine.no_sync(): leave the context for the last backward, then step"
            )
        if self._synced_backwards == 0:
            raise IllegalCall(
                "engine.step() without engine.backward(loss) before it (outside no_sync): there is no gradient to "
                "step with"
            )
        boundary = self.is_boundary(accumulation_steps)
        if boundary != self._reduced_for_boundary:
            raise IllegalCall(
                "set_gradient_accumulation_boundary() changed the boundary flag between engine.backward(loss) and "
                "engine.step(), but backward has used the old value; call it before backward"
            )
        return boundary

    def check_zero_grad(self) -> bool:
        """Whether zero_grad() has gradients of a script's own backward to discard. Raises IllegalCall if they are
        added to those of earlier micro-steps."""
        if self.script_ran_backward and self._backwards > self._synced_backwards:
            raise IllegalCall(
                "zero_grad() after loss.backward() in the middle of an accumulation: the gradients of earlier "
                "micro-steps are already added to this one's. Call engine.backward(loss), or detach() tensors that "
                "must not train this model"
            )
        return self.script_ran_backward

    def check_boundary(self, call: str, because: str) -> None:
        """Raises IllegalCall if `call` comes in the middle of an accumulation. because: the end of the message."""
        if self.in_progress:
            raise IllegalCall(f"{call} in the middle of an accumulation{because}")
