"""Mixtures of experts at every stage, where each rank's tokens go to other experts and one expert gets none at all:
equal to plain torch, without leaf modules being named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime.engine.initialize import initialize
from tests.harness import huggingface
from tests.numerics.training import HYPER, assert_equal, config

STEPS = 3
EXPERTS = 5


def stages_of(kind: str) -> tuple[int, ...]:
    """The kernels of experts differ in what they save for backward, which matters where parameters are resharded."""
    return (3,) if kind.endswith("_mm") else (0, 1, 2, 3)


class Layer(nn.Module):
    """Experts that are modules, as in transformers 4: only those that get tokens are called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.router = nn.Linear(16, EXPERTS, bias=False)
        expert = lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))  # noqa: E731
        setattr(self, name, nn.ModuleList(expert() for _ in range(EXPERTS)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weights, chosen = F.softmax(self.router(hidden), dim=-1).topk(2, dim=-1)
        output = hidden
        for index, expert in enumerate(getattr(self, self.name)):
            rows, slot = torch.where(chosen == index)
            if len(rows):
                output = output.index_add(0, rows, expert(hidden[rows]) * weights[rows, slot, None])
        return output


class Modules(nn.Module):
    """`layers`: how many layers there are, in a list; one is no list of several blocks, so that its experts are the
    model's only one."""

    def __init__(self, layers: int, name: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(huggingface.VOCABULARY, 16)
        self.layers = nn.ModuleList(Layer(name) for _ in range(layers))
        self.head = nn.Linear(16, huggingface.VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_other: Any) -> dict[str, torch.Tensor]:
        hidden = self.embedding(input_ids).flatten(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"loss": F.cross_entropy(self.head(hidden), labels.flatten())}


def make(kind: str) -> nn.Module:
    """A model whose routers send tokens of the lower half of the vocabulary to experts 0 and 1, those of the upper half
    to 2 and 3, and none to 4."""
    torch.manual_seed(1)
    if kind.startswith("modules"):
        model: Any = Modules(*{"modules": (2, "experts"), "modules-alone": (1, "mlps")}[kind])
        embedding = model.embedding.weight
        routers = [layer.router.weight for layer in model.layers]
    else:
        kind, _, implementation = kind.partition("/")
        changes = {"num_local_experts" if kind == "mixtral" else "num_experts": EXPERTS}
        model = huggingface.build(kind, **changes, output_router_logits=True, router_aux_loss_coef=0.02)
        model.set_experts_implementation(implementation)
        embedding = model.model.embed_tokens.weight
        routers = [layer.mlp.gate.weight for layer in model.model.layers]
    with torch.no_grad():
        half = huggingface.VOCABULARY // 2
        embedding[:half, 0], embedding[half:, 0] = 4, -4
        for router in routers:
            router.mul_(0.1)
            router[:, 0] = torch.tensor([2.0, 2, -2, -2, 0])
            router[4, 1:] = 0
    return model.train()


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    half = huggingface.VOCABULARY // 2
    tokens = torch.randint(half, (2, 8), generator=generator) + rank * half
    return {"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}


def routers_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if name.endswith((".gate", ".router")))


def experts_hit(model: nn.Module) -> set[int]:
    """The experts that get tokens from now on; it fills as the model runs."""
    hit: set[int] = set()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        hit.update(logits.topk(2, dim=-1).indices.flatten().tolist())

    for router in routers_of(model):
        router.register_forward_hook(note)
    return hit


def train_at(kinds: list[str]) -> dict[tuple[str, int], tuple[dict[str, torch.Tensor], list[float]]]:
    rank, results = dist.get_rank(), {}
    for kind in kinds:
        for stage in stages_of(kind):
            model = make(kind)
            hit = experts_hit(model)
            engine = initialize(model=model, config=config(stage, 1, clip=0.0))[0]
            losses = []
            for step in range(STEPS):
                loss = engine(**batch(step, rank))["loss"]
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
            assert hit == {2 * rank, 2 * rank + 1}, (kind, stage, rank, hit)
            whole = engine.module.state_dict()
            results[kind, stage] = {n: whole[n].clone() for n, _ in engine.module.named_parameters()}, losses
    return results


def train_plainly(kind: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """Both ranks' batches in one process; their losses are averaged, because the router's is no mean over tokens."""
    model = make(kind)
    update = torch.optim.AdamW(model.parameters(), **HYPER)
    losses: list[list[float]] = []
    for step in range(STEPS):
        losses.append([])
        for rank in range(2):
            loss = model(**batch(step, rank))["loss"]
            (loss / 2).backward()
            losses[-1].append(loss.item())
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        update.step()
        update.zero_grad()
    return dict(model.named_parameters()), losses


@pytest.mark.parametrize(
    "kinds",
    [
        ["modules", "modules-alone"],
        ["mixtral/eager", "mixtral/grouped_mm", "mixtral/batched_mm", "qwen3-moe/eager", "qwen3-moe/grouped_mm"],
    ],
    ids=["modules", "fused"],
)
def test_experts_without_tokens_on_some_ranks_train_as_in_plain_torch(ranks, kinds):
    results = ranks(2).run(train_at, kinds, timeout_s=180)
    for kind in kinds:
        expected, losses = train_plainly(kind)
        for rank, outcome in enumerate(results):
            for stage in stages_of(kind):
                found, found_losses = outcome[kind, stage]
                assert_equal(found, expected)
                assert found_losses == pytest.approx([both[rank] for both in losses], abs=1e-5), (kind, stage)


def test_the_auxiliary_loss_of_the_router_is_part_of_the_loss():
    model = make("mixtral/eager")
    inputs = batch(0, 0)
    with_it = model(**inputs)
    assert with_it.aux_loss > 0 and with_it.loss != model(**inputs, output_router_logits=False).loss
