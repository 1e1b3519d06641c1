"""Optimizers that are not torch.optim's: those that treat every element by itself train as in plain torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from runtime.config import ConfigError
from runtime.ops.lion import DeepSpeedCPULion
from tests.numerics.models import make
from tests.numerics.training import advance, assert_equal, config, message_of, micro_batch, parameters


class Averaged(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675) without the sign. Its constructor has an argument that is in no group."""

    def __init__(self, params, lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self.decay = decay

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                update = average * first + p.grad * (1 - first)
                p.mul_(1 - group["lr"] * self.decay).add_(update, alpha=-group["lr"])
                average.lerp_(p.grad, 1 - second)


class Halved(torch.optim.AdamW):
    """A step of its own on top of torch's."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)


class Plain(torch.optim.SGD):
    """No step of its own."""


class Decaying(torch.optim.Optimizer):
    """Its step becomes smaller by a count that it keeps as a tensor of shape [1]."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                count = self.state[p].setdefault("count", torch.zeros(1))
                count += 1
                p.addcdiv_(p.grad, count.expand_as(p), value=-group["lr"])


class Normalized(torch.optim.Optimizer):
    """Divides by the norm of the whole matrix."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class Closured(Normalized):
    def step(self, closure):
        closure()


MAKERS = {
    "own": lambda parameters: Averaged(parameters, 1e-2, decay=0.1),
    "subclass": lambda parameters: Halved(parameters, lr=1e-3, eps=1e-5),
    "count": Decaying,
    "plain subclass": lambda parameters: Plain(parameters, lr=1e-2, momentum=0.9),
    "lion": lambda parameters: DeepSpeedCPULion(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
}


def train_plainly_with(name: str) -> dict[str, torch.Tensor]:
    model = make("plain")
    optimizer = MAKERS[name](model.parameters())
    for step in range(4):
        for rank in range(2):
            (model(*micro_batch(step, 0, rank, 2)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def train_with(
    name: str, stage: int, folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    from runtime.engine.initialize import initialize

    def engine():
        settings = config(stage, 1, clip=0.0)
        del settings["optimizer"]
        model = make("plain")
        return initialize(model=model, optimizer=MAKERS[name](model.parameters()), config=settings)[0]

    whole, resumed = engine(), engine()
    advance(whole, 0, 2)
    whole.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    for one in (whole, resumed):
        advance(one, 2, 4)
    model = make("plain")
    makers = [partial(initialize, model=model, optimizer=kind, config=whole.config) for kind in (Normalized, Closured)]
    return parameters(whole), parameters(resumed), [message_of(ConfigError, maker) for maker in makers]


@pytest.mark.parametrize(
    ("name", "stage"), [("own", 1), ("subclass", 3), ("count", 2), ("count", 3), ("plain subclass", 2), ("lion", 3)]
)
def test_an_optimizer_of_single_elements_trains_as_in_plain_torch(ranks, name, stage, tmp_path):
    plain = train_plainly_with(name)
    for whole, resumed, refusals in ranks(2).run(train_with, name, stage, str(tmp_path)):
        assert_equal(whole, plain)
        assert_equal(resumed, whole, tolerance=0)
        assert "needs full parameters" in refusals[0]
        assert "failed on a flat shard (TypeError" in refusals[1]


def one_element(folder: str) -> list[torch.Tensor]:
    from runtime.engine.initialize import initialize

    found = []
    for load in (False, True):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        settings = config(1, 1, clip=0.0)
        del settings["optimizer"]
        engine = initialize(model=model, optimizer=Decaying(model.parameters()), config=settings)[0]
        if load:
            engine.load_checkpoint(folder)
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 1)).sum())
            engine.step()
        if not load:
            engine.save_checkpoint(folder)
        found.append(model.weight.detach().clone())
    return found


def test_a_count_is_no_state_of_an_element_though_there_is_only_one(ranks, tmp_path):
    for before, after in ranks(2).run(one_element, str(tmp_path)):
        assert before.item() == pytest.approx(1 - 0.01 * (1 + 1 / 2))
        assert after.item() == pytest.approx(1 - 0.01 * (1 + 1 / 2 + 1 / 3 + 1 / 4))


def test_lion_steps_by_the_sign_of_its_average():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = DeepSpeedCPULion([parameter], lr=0.5, betas=(0.5, 0.75), weight_decay=0.1)
    for gradient, expected in (([4.0, -8.0, 0.0], [0.45, -1.4, 2.85]), ([-0.5, 4.0, 0.0], [-0.0725, -1.83, 2.7075])):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        assert torch.allclose(parameter, torch.tensor(expected))
    with pytest.raises(ValueError, match="always fp32"):
        DeepSpeedCPULion([parameter], fp32_optimizer_states=False)
