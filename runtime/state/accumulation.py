"""The gradient accumulation of one engine: where it stands, what it has summed up, and which calls are illegal now."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class AccumulationState(enum.Enum):
    """Where an engine stands between two boundaries. (FSDP2's TrainingState plays the same role.)"""

    BOUNDARY = "between two optimizer steps; no gradient is held"
    BACKWARD = "a backward is running"
    BACKWARD_DONE = "a backward has ended, and no step() has taken its micro-step yet"
    ACCUMULATING = "step() has ended a micro-step that was not the accumulation's last"
    FAILED = "a backward ended with an exception, so the gradients of this rank are incomplete"


class Accumulation:
    """Counts micro-steps and sums up their losses. The one place that refuses calls in the wrong order."""

    def __init__(self, trains: bool) -> None:
        """trains: False for an engine without an optimizer, which refuses backward() and step()."""
        self.trains = trains
        self.state = AccumulationState.BOUNDARY
        self.micro_steps = 0
        """Micro-steps so far, over all accumulations."""
        self.start = 0
        """The micro-step from which accumulations are counted: set_train_batch_size() changes how many make one."""
        self.forced_boundary: bool | None = None
        """What set_gradient_accumulation_boundary() said last; None: boundaries are counted."""
        self.syncs = True
        """False inside no_sync(): gradients only accumulate on this rank."""
        self.script_ran_backward = False
        """The last backward was the script's own loss.backward(), and step() has not taken it yet."""
        self.loss_is_scaled = False
        """scale() was called for the script's next loss.backward()."""
        self.tokens = 0
        """Tokens of this rank's micro-batches since the last boundary."""
        self._backwards = 0
        """Backwards since the last boundary."""
        self._synced_backwards = 0
        """Those of them since the last step() that were outside no_sync()."""
        self._reduced_for_boundary: bool | None = None
        """Whether the last backward took its micro-step for the accumulation's last."""
        self._loss_sum: torch.Tensor | float = 0.0
        self._losses = 0
        self._failure = ""

    # ---- where it stands -------------------------------------------------------------------------------------------
    def is_boundary(self, accumulation_steps: int) -> bool:
        """Whether the micro-step under way is the accumulation's last."""
        if self.forced_boundary is not None:
            return self.forced_boundary
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
        """Mean over this rank's backwards since the last boundary; None where the script ran them itself on a loss
        that nobody knows."""
        return self._loss_sum / self._losses if self._losses else None

    # ---- what happens ----------------------------------------------------------------------------------------------
    def begin_backward(self) -> None:
        self.state = AccumulationState.BACKWARD

    def end_backward(self, loss: torch.Tensor | None, accumulation_steps: int, by_script: bool = False) -> None:
        """loss: () the unscaled loss, if it is known."""
        if loss is not None:
            self._loss_sum = self._loss_sum + loss.detach().double()
            self._losses += 1
        self._backwards += 1
        self._synced_backwards += self.syncs
        self.script_ran_backward, self.loss_is_scaled = by_script, False
        self._reduced_for_boundary = self.is_boundary(accumulation_steps)
        self.state = AccumulationState.BACKWARD_DONE

    def fail(self, what: str) -> None:
        """A backward ended with an exception."""
        self.state, self._failure = AccumulationState.FAILED, what

    def end_micro_step(self) -> None:
        self.micro_steps += 1
        self._synced_backwards, self.script_ran_backward = 0, False
        self.state = AccumulationState.ACCUMULATING

    def end_step(self) -> None:
        """The boundary's optimizer step is over."""
        self._loss_sum, self._losses, self.tokens, self._backwards = 0.0, 0, 0, 0
        self.state = AccumulationState.BOUNDARY

    def restart(self) -> None:
        """Forget what has been accumulated: checkpoints are of boundaries, so loading one begins an accumulation."""
        self._synced_backwards, self.script_ran_backward = 0, False
        self.start = self.micro_steps
        self.end_step()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backwards accumulate on this rank and reduce nothing."""
        if not self.syncs:
            raise RuntimeError(
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
        """Raises RuntimeError where the engine has no optimizer."""
        if not self.trains:
            raise RuntimeError(
                f"engine.{call}: this engine was made without an optimizer, for evaluation; to train, add an "
                '"optimizer" section to the config or call initialize(optimizer=...)'
            )

    def check_not_failed(self, step: int) -> None:
        """Raises RuntimeError after a backward that ended with an exception. step: the one under way."""
        if self.state is AccumulationState.BACKWARD:  # nobody has heard of its end
            self.fail(f"loss.backward() at step {step} ended with an exception")
        if self.state is AccumulationState.FAILED:
            raise RuntimeError(
                f"{self._failure}: the gradients of that backward are incomplete on this rank, and the collectives of "
                "the ranks may no longer match. Restart all ranks from the newest checkpoint"
            )

    def check_step(self, accumulation_steps: int) -> bool:
        """Raises RuntimeError where engine.step() has nothing to do. Returns whether it ends the accumulation."""
        if not self.syncs:
            raise RuntimeError(
                "engine.step() inside engine.no_sync(): leave the context for the last backward, then step"
            )
        if self._synced_backwards == 0:
            raise RuntimeError(
                "engine.step() without engine.backward(loss) before it (outside no_sync): there is no gradient to "
                "step with"
            )
        boundary = self.is_boundary(accumulation_steps)
        if boundary != self._reduced_for_boundary:
            raise RuntimeError(
                "set_gradient_accumulation_boundary() was called between engine.backward(loss) and engine.step(), "
                "after backward had reduced the gradients, or not, by the old value; call it before backward"
            )
        return boundary

    def check_zero_grad(self) -> bool:
        """Whether zero_grad() has gradients of a script's own backward to discard. Raises RuntimeError where they can't
        be told from those of earlier micro-steps."""
        if self.script_ran_backward and self._backwards > self._synced_backwards:
            raise RuntimeError(
                "zero_grad() after loss.backward() in the middle of an accumulation: the gradients of its earlier "
                "micro-steps can't be told from this one's. Call engine.backward(loss), or detach() what shall not "
                "train this model"
            )
        return self.script_ran_backward

    def check_boundary(self, call: str, because: str) -> None:
        """Raises RuntimeError where `call` comes in the middle of an accumulation."""
        if self.in_progress:
            raise RuntimeError(f"{call} in the middle of an accumulation{because}")
