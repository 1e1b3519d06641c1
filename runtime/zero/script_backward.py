"""What has to happen around every backward, whoever starts it.

engine.backward(loss)   begin | torch's backward of the loss, scaled | end
loss.backward()         the first gradient that arrives begins it, torch's callback at the end of the graph ends it
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from runtime.zero.hooks import EngineHook

_engine_backwards = 0
"""engine.backward() calls under way in this process: what else receives gradients in one is not that engine's."""


class Backwards(Protocol):
    """The engine, as far as a script's own loss.backward() concerns it."""

    def begin_script_backward(self) -> None:
        """The first gradient has arrived. Raises RuntimeError where the script may not do that."""

    def end_script_backward(self, loss: torch.Tensor | None) -> None:
        """The last has. loss: what the last forward returned, where that was a loss."""


@contextmanager
def engine_backward() -> Iterator[None]:
    """Around an engine's own backward."""
    global _engine_backwards
    _engine_backwards += 1
    try:
        yield
    finally:
        _engine_backwards -= 1


class ScriptBackward:
    """Notices loss.backward() of the script's. torch has no hook at a backward's beginning, so the outputs of the
    engine's forward have one each; and the end can be asked for from inside a backward only. Both must be of the
    outermost backward: under re-entrant checkpointing parameters receive their gradients in one within. (A script that
    calls engine.module itself gets several backwards there, which add up.)"""

    def __init__(self) -> None:
        self._backwards: Callable[[], Backwards | None] = lambda: None
        self._loss: torch.Tensor | None = None
        self._graph: int | None = None
        """Number of the backward whose end is asked for."""
        self._begun = False

    def bind(self, backwards: Backwards) -> None:
        """backwards: the engine. Held weakly, for torch keeps hooks where the garbage collector can't see them."""
        self._backwards = weakref.ref(backwards)

    def begins(self) -> bool:
        """A gradient arrives that no engine.backward() of this engine has begun: whether it is the script's own
        backward. Begins it."""
        backwards = self._backwards()
        if _engine_backwards or backwards is None:
            return False
        backwards.begin_script_backward()
        self._begun = True
        if self._graph is None:  # of a part of the model
            self._ask_for_end()
        return True

    def watch(self, output: Any) -> None:
        """What a forward has returned."""
        if not torch.is_grad_enabled():
            return
        self._loss = None
        found = list(outputs(output))
        if len(found) == 1 or (isinstance(output, Mapping) and "loss" in output) or hasattr(output, "loss"):
            loss = found[0] if len(found) == 1 else _loss_of(output)
            self._loss = loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        for tensor in found:
            tensor.register_hook(EngineHook(self, ScriptBackward._reached))

    def _reached(self, _gradient: torch.Tensor) -> None:
        if not _engine_backwards and self._graph != _graph_under_way():
            self._ask_for_end()

    def _ask_for_end(self) -> None:
        self._graph = _graph_under_way()
        torch.autograd.Variable._execution_engine.queue_callback(_when_alive(self))  # type: ignore[attr-defined]

    def _ended(self) -> None:
        self._graph = None
        backwards = self._backwards()
        if self._begun and backwards is not None:
            self._begun = False
            backwards.end_script_backward(self._loss)


def _when_alive(script: ScriptBackward) -> Callable[[], None]:
    weak = weakref.ref(script)

    def call() -> None:
        if (alive := weak()) is not None:
            alive._ended()

    return call


def outputs(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a forward's result that a backward can come through."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad and output.grad_fn is not None:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from outputs(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from outputs(value)
    elif hasattr(output, "__dict__") and not isinstance(output, (type, nn.Module)) and not callable(output):
        for value in vars(output).values():
            yield from outputs(value)


def _loss_of(output: Any) -> Any:
    return output["loss"] if isinstance(output, Mapping) else output.loss


def _graph_under_way() -> int:
    return int(torch._C._current_graph_task_id())  # type: ignore[attr-defined]
