"""Phases by torch's hooks: what is told, in which order, and that nothing is left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from runtime.telemetry.watching.hooks import attach_model, attach_optimizer, batch_size


class Told:
    """Keeps the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, values))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        return {"loss": hidden.sum(), "hidden": [hidden]} if labels is not None else hidden


LOOP = [
    "forward_begins",
    "forward_ended",
    "backward_begins",
    "gradients_computed",
    "backward_ended",
    "step_begins",
    "step_ended",
]


@pytest.mark.parametrize("with_loss", [True, False])
def test_a_step_is_told_in_order_and_hooks_are_removed(with_loss: bool) -> None:
    model, told = Net(), Told()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    remove = (attach_model(model, told), attach_optimizer(optimizer, told))
    ids = torch.zeros(2, 3, dtype=torch.long)
    output = model(ids, labels=ids) if with_loss else model(ids)
    (output["loss"] if with_loss else output.square().mean()).backward()
    optimizer.step()
    assert told.names == LOOP
    calls = dict(told.calls)
    assert calls["forward_begins"] == (2, 6)
    assert (calls["forward_ended"][0] is not None) == with_loss
    for one in remove:
        one()
    model(ids).sum().backward()
    optimizer.step()
    assert told.names == LOOP


def test_the_backward_of_a_model_begins_before_other_hooks_on_its_outputs() -> None:
    """FSDP2 queues its end of backward from such a hook, and ours must come before."""
    model, order = nn.Linear(2, 1), list[str]()

    def hook_output(_module: Any, _arguments: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda _gradient: order.append("other"))

    model.register_forward_hook(hook_output)
    told = Told()
    told.backward_begins = lambda: order.append("ours")  # type: ignore[method-assign]
    attach_model(model, told)
    model(torch.ones(1, 2)).sum().backward()
    assert order == ["ours", "other"]


def test_an_evaluation_is_none_of_the_steps() -> None:
    model, told = Net().eval(), Told()
    attach_model(model, told)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    assert told.names == ["evaluation_begins", "evaluation_ended"]


def test_several_passes_before_a_step_are_micro_steps() -> None:
    model, told = Net(), Told()
    attach_model(model, told)
    for _ in range(3):
        model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert told.names == LOOP[:5] * 3


def test_gradients_are_the_same_with_and_without_hooks() -> None:
    ids = torch.arange(6).reshape(2, 3)
    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = Net()
        if watched:
            attach_model(model, Told())
        model(ids).square().sum().backward()
        assert model.embedding.weight.grad is not None
        found.append(model.embedding.weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (torch.zeros(4, 7, dtype=torch.long), (4, 28)),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.long), "labels": torch.zeros(2, 5)}, (2, 10)),
        ({"inputs_embeds": torch.zeros(2, 5, 16)}, (2, 10)),
        ([torch.zeros(3, 1, 28, 28), torch.zeros(3, dtype=torch.long)], (3, None)),  # images and their classes
        ("text", (None, None)),
        (SimpleNamespace(x=1), (None, None)),
    ],
)
def test_samples_and_tokens_of_a_batch(batch: Any, sizes: tuple[int | None, int | None]) -> None:
    assert batch_size(batch) == sizes
