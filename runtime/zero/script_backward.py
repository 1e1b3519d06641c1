"""Detects the beginning and end of a backward that the script runs itself.

engine.backward(loss)   begin | torch's backward of the scaled loss | end
loss.backward()         begins with the first gradient that arrives, ends with torch's callback at the end of the graph
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
"""engine.backward() calls under way in this process. In one, other engines' models may receive gradients, too."""


class BackwardOwner(Protocol):
    """The engine, as a script's own loss.backward() calls it."""

    def begin_script_backward(self) -> None:
        """The first gradient has arrived. Raises RuntimeError if the script must not run a backward now."""

    def end_script_backward(self, loss: torch.Tensor | None) -> None:
        """The last gradient has arrived. loss: () what the last forward returned, if that was a loss."""


@contextmanager
def engine_backward() -> Iterator[None]:
    """Marks the time in which an engine runs a backward itself."""
    global _engine_backwards
    _engine_backwards += 1
    try:
        yield
    finally:
        _engine_backwards -= 1


class ScriptBackward:
    """Detects a script's own loss.backward().

    torch has no hook for the beginning of a backward, so each output of the engine's forward gets one, which requests a
    callback at the end of the graph: that is possible only inside a backward. Both must concern the outermost backward,
    because under re-entrant checkpointing parameters receive their gradients in an inner one. (A script that calls
    engine.module itself gets several backwards there, which add up.)
    """

    def __init__(self) -> None:
        self._owner: Callable[[], BackwardOwner | None] = lambda: None
        self._loss: torch.Tensor | None = None
        self._graph: int | None = None
        """torch's id of the backward for whose end a callback is requested."""
        self._begun = False

    def bind(self, owner: BackwardOwner) -> None:
        """owner: the engine. The reference is weak, because torch keeps hooks where the garbage collector can't see
        them."""
        self._owner = weakref.ref(owner)

    def begin(self) -> bool:
        """Called for a gradient that arrives outside this engine's backward(). Returns whether it is from the script's
        own backward, and begins that."""
        owner = self._owner()
        if _engine_backwards or owner is None:
            return False
        owner.begin_script_backward()
        self._begun = True
        if self._graph is None:  # only a part of the model was called
            self._request_end_callback()
        return True

    def watch(self, output: Any) -> None:
        """Hook the tensors that a forward has returned, to detect a backward through them."""
        if not torch.is_grad_enabled():
            return
        self._loss = None
        found = list(outputs(output))
        if len(found) == 1 or (isinstance(output, Mapping) and "loss" in output) or hasattr(output, "loss"):
            loss = found[0] if len(found) == 1 else _loss_of(output)
            self._loss = loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None
        for tensor in found:
            tensor.register_hook(EngineHook(self, ScriptBackward._reached_output))

    def _reached_output(self, _gradient: torch.Tensor) -> None:
        if not _engine_backwards and self._graph != _graph_under_way():
            self._request_end_callback()

    def _request_end_callback(self) -> None:
        self._graph = _graph_under_way()
        torch.autograd.Variable._execution_engine.queue_callback(_weak_end_callback(self))  # type: ignore[attr-defined]

    def _on_end(self) -> None:
        self._graph = None
        owner = self._owner()
        if self._begun and owner is not None:
            self._begun = False
            owner.end_script_backward(self._loss)


def _weak_end_callback(script: ScriptBackward) -> Callable[[], None]:
    weak = weakref.ref(script)

    def call() -> None:
        if (alive := weak()) is not None:
            alive._on_end()

    return call


def outputs(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a forward's `output` through which a backward can enter."""
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
    return output.get("loss") if isinstance(output, Mapping) else output.loss


def _graph_under_way() -> int:
    return int(torch._C._current_graph_task_id())  # type: ignore[attr-defined]
