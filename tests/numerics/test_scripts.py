"""What scripts do with the engine, right and wrong: their own optimizers and schedulers, slips, gradients that are not
finite, and what a checkpoint must bring back to them."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from runtime.checkpoint import CheckpointError, newest
from runtime.config import ConfigError
from tests.numerics.models import make
from tests.numerics.training import (
    advance,
    assert_equal,
    config,
    engine_for,
    message_of,
    micro_batch,
    parameters,
    train_plainly_grouped,
)


# ---- the script's own optimizer and scheduler ------------------------------------------------------------------------
def grouped(model: torch.nn.Module) -> list[dict]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "lr": 5e-4, "weight_decay": 0.0}]


def train_with_own_optimizer(stage: int):
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    model = make("plain")
    optimizer = torch.optim.AdamW(grouped(model), lr=1e-3, eps=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    settings = config(stage, 1, clip=0.0)
    del settings["optimizer"]
    engine, _, _, _ = initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings)
    for step in range(8):
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size())))
        engine.step()
    return parameters(engine), engine.get_lr(), scheduler.get_last_lr()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_script_brings_its_optimizer_groups_and_scheduler(ranks, stage):
    plain = train_plainly_grouped(grouped, world=2, steps=8, schedule=lambda step: (step + 1) / 10)
    for ours, engine_lr, scheduler_lr in ranks(2).run(train_with_own_optimizer, stage):
        assert engine_lr == scheduler_lr == pytest.approx([9e-4, 4.5e-4])
        assert_equal(ours, plain)


def refuse_other_optimizers() -> list[str]:
    from runtime.engine.initialize import initialize

    model, settings = make("plain"), config(1, 1, clip=0.0)
    stray = torch.nn.Parameter(torch.zeros(3))
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([stray], lr=1.0), lambda step: 1.0)
    lbfgs = torch.optim.LBFGS(model.parameters())
    return [
        message_of(ConfigError, lambda: initialize(model=model, model_parameters=[stray], config=settings)),
        message_of(ConfigError, lambda: initialize(model=model, lr_scheduler=other, config=settings)),
        message_of(ConfigError, lambda: initialize(model=model, optimizer=lbfgs, config=settings)),
        message_of(ConfigError, lambda: initialize(model=model.half(), config=settings)),
    ]


def test_what_would_train_nothing_is_refused(ranks):
    (messages,) = ranks(1).run(refuse_other_optimizers)
    for message, words in zip(
        messages, ["not in the model", "another optimizer", "expected an elementwise optimizer", "float16"], strict=True
    ):
        assert words in message


def one_model_two_engines() -> float | None:
    from runtime.engine.initialize import initialize

    model = make("plain")
    for _ in range(2):
        engine, _, _, _ = initialize(model=model, config=config(1, 1, clip=0.0))
    advance(engine, 0, 1)
    return engine.get_global_grad_norm()


def test_the_newest_engine_on_a_model_trains_it(ranks):
    assert all(norm and norm > 0.1 for norm in ranks(2).run(one_model_two_engines))


def disagree() -> str:
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    model = make("plain" if dist.get_rank() == 0 else "flatland")
    return message_of(ConfigError, lambda: initialize(model=model, config=config(1, 1, clip=0.0)))


def test_ranks_that_disagree_about_the_model_say_where(ranks):
    for message in ranks(2).run(disagree):
        assert "rank 0 has parameter scale [1] float32" in message and "rank 1 has embedding.weight [37, 7]" in message


# ---- slips -----------------------------------------------------------------------------------------------------------
def slips() -> list[str]:
    engine = engine_for(config(0, 2, clip=0.0))
    batch = micro_batch(0, 0, 0, 1)
    found = [message_of(RuntimeError, engine.step)]
    with engine.no_sync():
        engine.backward(engine(*batch))
    found.append(message_of(RuntimeError, engine.step))
    engine.backward(engine(*batch))
    engine.step()
    found.append(message_of(RuntimeError, engine.step))
    found.append(message_of(CheckpointError, lambda: engine.save_checkpoint("/nowhere")))
    found.append(message_of(ValueError, lambda: engine.backward(torch.zeros(3))))
    return found


def test_slips_are_errors_and_not_wrong_gradients(ranks):
    (messages,) = ranks(1).run(slips)
    words = ["without engine.backward", "outside no_sync", "without engine.backward", "middle of an", "scalar"]
    assert all(word in message for word, message in zip(words, messages, strict=True)), messages


# ---- gradients that are not finite -----------------------------------------------------------------------------------
def poison(folder: str):
    import torch.distributed as dist

    engine = engine_for(config(2, 1, clip=1.0))
    advance(engine, 0, 2)
    before = parameters(engine)
    loss = engine(*micro_batch(2, 0, dist.get_rank(), dist.get_world_size()))
    engine.backward(loss * (torch.inf if dist.get_rank() == 1 else 1.0))
    engine.step()
    after, steps = parameters(engine), (engine.global_steps, engine.state.counters.optimizer_steps)
    engine.save_checkpoint(folder)
    advance(engine, 3, 4)
    return before, after, steps, parameters(engine)


def test_a_gradient_that_is_not_finite_changes_nothing(ranks, tmp_path):
    for before, after, steps, later in ranks(2).run(poison, str(tmp_path)):
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert steps == (3, 2)
        assert all(value.isfinite().all() for value in later.values())


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def save_on_a_full_disk(folder: str) -> tuple[str, bool]:
    import signal

    import torch.distributed as dist

    engine = engine_for(config(1, 1, clip=0.0))
    advance(engine, 0, 1)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails instead of killing the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        text = message_of(CheckpointError, lambda: engine.save_checkpoint(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    advance(engine, 1, 2)  # the ranks are still in step with each other
    return text, engine.global_steps == 2


def test_a_full_disk_on_one_rank_is_every_ranks_error_and_training_goes_on(ranks, tmp_path):
    for text, went_on in ranks(2).run(save_on_a_full_disk, str(tmp_path)):
        assert "could not write" in text and went_on
    assert newest(tmp_path) is None and list(tmp_path.iterdir()) == []


class Counter:
    n = 0

    def state_dict(self) -> dict:
        return {"n": self.n}

    def load_state_dict(self, state: dict) -> None:
        self.n = state["n"]


def bring_back(folder: str):
    engine = engine_for(config(1, 2, clip=0.0))
    counter = Counter()
    counter.n = 7
    engine.register_state(counter=counter)
    advance(engine, 0, 3)
    bad = message_of(CheckpointError, lambda: engine.save_checkpoint(folder, client_state={"bad": Counter()}))
    engine.save_checkpoint(folder, client_state={"best": np.float64(0.5), "names": ["a"]})
    other = engine_for(config(2, 4, clip=0.0))  # another stage and accumulation
    _, client_state = other.load_checkpoint(folder)
    late = Counter()
    other.register_state(counter=late)
    advance(other, 3, 5)
    return bad, client_state, late.n, other.global_steps, other.micro_steps


def test_a_checkpoint_brings_back_what_the_script_gave_it(ranks, tmp_path):
    for bad, client_state, registered, steps, micro_steps in ranks(2).run(bring_back, str(tmp_path)):
        assert "client_state holds something that can't be read back" in bad and "\x1b" not in bad
        assert client_state == {"best": 0.5, "names": ["a"]} and registered == 7
        assert (steps, micro_steps) == (5, 20)


def freeze_and_thaw(folder: str, stage: int):
    first = engine_for(config(stage, 1, clip=0.0), "frozen")
    advance(first, 0, 2)
    first.save_checkpoint(folder)
    thawed = engine_for(config(1, 1, clip=0.0), "plain")
    thawed.load_checkpoint(folder)
    loaded = parameters(thawed)
    advance(thawed, 2, 3)
    thawed.save_checkpoint(folder)
    frozen = engine_for(config(stage + 1, 1, clip=0.0), "frozen")
    frozen.load_checkpoint(folder)
    return parameters(first), loaded, parameters(thawed), parameters(frozen)


@pytest.mark.parametrize("stage", [1, 2])
def test_freezing_may_change_between_attempts(ranks, tmp_path, stage):
    for first, loaded, thawed, frozen in ranks(2).run(freeze_and_thaw, str(tmp_path), stage):
        assert_equal(loaded, first, tolerance=0)
        assert_equal(frozen, thawed, tolerance=0)


def change_the_rate(folder: str) -> tuple[list[float], list[float]]:
    engine = engine_for(config(1, 1, clip=0.0))
    advance(engine, 0, 1)
    engine.optimizer.param_groups[0]["lr"] = 2e-4  # as a schedule of the script's would
    engine.save_checkpoint(folder)
    same = engine_for(config(1, 1, clip=0.0))
    same.load_checkpoint(folder)
    changed = config(1, 1, clip=0.0)
    changed["optimizer"]["params"]["lr"] = 5e-4
    other = engine_for(changed)
    other.load_checkpoint(folder)
    return same.get_lr(), other.get_lr()


def test_a_changed_learning_rate_in_the_config_counts(ranks, tmp_path):
    (rates,) = ranks(1).run(change_the_rate, str(tmp_path))
    assert rates == ([2e-4], [5e-4])
