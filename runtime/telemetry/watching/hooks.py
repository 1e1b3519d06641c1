"""Phases of a trainer that is not ours, by torch's public hooks: forward hooks of the model, a hook on its outputs'
gradient, and step hooks of the optimizer. Nothing is replaced, and no hook changes a value.

[Note: the end of backward]
Autograd has no hook for it, but runs callbacks that were queued while it computed (DistributedDataParallel and FSDP2
wait for their communication in such ones). Ours is queued when backward begins, so it runs first: gradients are
computed. It queues a second one, which runs after all others: what lies between is time for which the training thread
was blocked in communication. FSDP2 queues its callback when backward begins, too, by a hook on the outputs that it adds
in a forward hook. So the forward hook that adds ours comes before all other ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from runtime.telemetry.watching.guard import never_raises

_OUTPUTS_LOOKED_AT = 32
_TOKEN_NAMES = ("input_ids", "tokens", "inputs_embeds")


class PhaseListener(Protocol):
    """What the hooks tell."""

    def forward_begins(self, samples: int | None, tokens: int | None) -> None:
        """The model is called with so many samples and tokens; None if its arguments do not tell."""

    def forward_ended(self, loss: Any) -> None:
        """It has returned; loss: a tensor of one element, if the model computed one."""

    def backward_begins(self) -> None:
        """Autograd has come to the model's outputs."""

    def gradients_computed(self) -> None:
        """Of all parameters; they may still have to be reduced."""

    def backward_ended(self) -> None:
        """They are reduced, as far as the training thread waits for it."""

    def evaluation_begins(self) -> None:
        """The model is called in evaluation mode."""

    def evaluation_ended(self) -> None:
        """That call has returned."""

    def step_begins(self) -> None:
        """The optimizer is about to step."""

    def step_ended(self) -> None:
        """The optimizer has stepped."""


def attach_model(model: Any, listener: PhaseListener) -> Callable[[], None]:
    """Tell `listener` of the passes through `model`; returns what removes the hooks."""

    @never_raises
    def before(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training:
            listener.forward_begins(*_sizes(arguments, named))
        else:
            listener.evaluation_begins()

    @never_raises
    def watch_backward(module: Any, _arguments: tuple[Any, ...], output: Any) -> None:
        if not module.training:
            return
        begun: list[bool] = []

        @never_raises
        def backward(_gradient: Any) -> None:
            if begun:
                return
            begun.append(True)
            listener.backward_begins()
            _when_backward_ends(listener)

        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(backward)

    @never_raises
    def after(module: Any, _arguments: tuple[Any, ...], output: Any) -> None:
        if module.training:
            listener.forward_ended(_loss_of(output))
        else:
            listener.evaluation_ended()

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(watch_backward, prepend=True),
        model.register_forward_hook(after),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def attach_optimizer(optimizer: Any, listener: PhaseListener) -> Callable[[], None]:
    """Tell `listener` of the steps of `optimizer`; returns what removes the hooks."""
    handles = (
        optimizer.register_step_pre_hook(never_raises(lambda *_given: listener.step_begins())),
        optimizer.register_step_post_hook(never_raises(lambda *_given: listener.step_ended())),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _when_backward_ends(listener: PhaseListener) -> None:
    """See the note. Without the callbacks (another torch) backward ends with whatever follows it."""
    engine = getattr(sys.modules["torch"].autograd.Variable, "_execution_engine", None)
    if engine is None:
        return

    @never_raises
    def reduced() -> None:
        listener.backward_ended()

    @never_raises
    def computed() -> None:
        listener.gradients_computed()
        engine.queue_callback(reduced)

    engine.queue_callback(computed)


def batch_size(batch: Any) -> tuple[int | None, int | None]:
    """Samples and tokens of a batch: a tensor, a mapping, or a list of these."""
    if isinstance(batch, Mapping):
        return _sizes((), batch)
    return _sizes(tuple(batch) if isinstance(batch, list | tuple) else (batch,), {})


# ---- what models take and return -------------------------------------------------------------------------------------
def _sizes(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Samples and tokens of a call: token ids are (samples, length) whole numbers, embeddings have a third
    dimension."""
    found: Any = next((named[name] for name in _TOKEN_NAMES if _is_tensor(named.get(name))), None)
    if found is None:
        found = next((value for value in (*arguments, *named.values()) if _is_tensor(value) and value.dim()), None)
    if found is None:
        return None, None
    ids = found.dim() == 2 and not found.is_floating_point()
    tokens = found.shape[0] * found.shape[1] if ids or named.get("inputs_embeds") is found else None
    return int(found.shape[0]), tokens


def _is_tensor(value: Any) -> bool:
    return isinstance(value, sys.modules["torch"].Tensor)


def _loss_of(output: Any) -> Any:
    """`output.loss`, or `output` itself if it is a tensor of one element."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    loss = output if loss is None and _is_tensor(output) else loss
    return loss if loss is not None and _is_tensor(loss) and loss.numel() == 1 else None


def _tensors(output: Any) -> Iterator[Any]:
    """The tensors in an output, a limited number of them."""
    waiting, seen = [output], 0
    while waiting and seen < _OUTPUTS_LOOKED_AT:
        value = waiting.pop()
        seen += 1
        if _is_tensor(value):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
