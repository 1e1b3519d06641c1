"""Every elementwise optimizer of torch.optim: named in the config or brought by the script, the parameters equal plain
torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.models import batch, make
from tests.numerics.training import assert_equal, config, micro_batch, parameters

STEPS = 8
NUMBERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True, "eps": 1e-4},
    "Adadelta": {"lr": 0.5, "rho": 0.8},
    "Adamax": {"lr": 1e-3, "eps": 1e-5},
    "NAdam": {"lr": 1e-3, "eps": 1e-5, "momentum_decay": 0.01},
    "RAdam": {"lr": 1e-3, "eps": 1e-5},
    "ASGD": {"lr": 0.05, "t0": 3.0, "lambd": 0.01},
    "Rprop": {"lr": 1e-4, "step_sizes": [1e-6, 1e-3]},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.1, "lr_decay": 0.1},
}


def train(kind: str, stage: int, own: bool) -> dict[str, torch.Tensor]:
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    model, settings = make("plain"), config(stage, 1, clip=0.0)
    settings["optimizer"] = {"type": kind, "params": NUMBERS[kind]}
    optimizer = None
    if own:
        del settings["optimizer"]
        optimizer = getattr(torch.optim, kind)(model.parameters(), **NUMBERS[kind])
    engine = initialize(model=model, optimizer=optimizer, config=settings)[0]
    for step in range(STEPS):
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size())))
        engine.step()
    return parameters(engine)


def train_plainly(kind: str) -> dict[str, torch.Tensor]:
    model = make("plain")
    optimizer = getattr(torch.optim, kind)(model.parameters(), **NUMBERS[kind])
    for step in range(STEPS):
        rows = [batch(step, sample) for sample in range(4)]
        model(torch.cat([t for t, _ in rows]), torch.cat([t for _, t in rows])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", NUMBERS)
def test_equals_plain_torch(ranks, kind):
    plain = train_plainly(kind)
    for stage, own in ((0, True), (2, False), (3, True)):
        for ours in ranks(2).run(train, kind, stage, own):
            # Rprop looks at signs: where a gradient is zero but for rounding it steps by its smallest step either way.
            assert_equal(ours, plain, tolerance=1e-4 if kind == "Rprop" else 1e-5)


def used_ones() -> list[str]:
    from runtime.config import ConfigError
    from runtime.engine.initialize import initialize

    found = []
    for kind in ("Adagrad", "SGD", "AdamW"):
        model, settings = make("plain"), config(1, 1, clip=0.0)
        del settings["optimizer"]
        optimizer = getattr(torch.optim, kind)(model.parameters(), **NUMBERS.get(kind, {}))
        model(*micro_batch(0, 0, 0, 1)).backward()
        optimizer.step()
        try:
            initialize(model=model, optimizer=optimizer, config=settings)
        except ConfigError as error:
            found.append(str(error))
    return found


def test_one_that_has_stepped_is_refused(ranks):
    (messages,) = ranks(1).run(used_ones)
    assert len(messages) == 3 and all("has stepped already" in message for message in messages)
