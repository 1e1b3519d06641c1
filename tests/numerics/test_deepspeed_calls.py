"""Calls and names of DeepSpeed's that scripts use beside the plain loop: they are here, and do what they say."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from runtime.checkpoint import CheckpointError
from runtime.config import ConfigError
from tests.numerics.models import Uneven, make
from tests.numerics.training import (
    advance,
    assert_equal,
    config,
    engine_for,
    message_of,
    micro_batch,
    parameters,
    train_plainly,
)

SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}}}


# ---- initialize ------------------------------------------------------------------------------------------------------
class Split:
    def __init__(self, parts: int) -> None:
        self.parts = parts

    def get_model_parallel_world_size(self) -> int:
        return self.parts


def initialize_as_deepspeed() -> list[Any]:
    import runtime as deepspeed

    settings = config(2, 1, clip=0.0, log_level="ERROR")
    model = make("plain")
    # By position, as DeepSpeed orders them.
    made = deepspeed.initialize(
        None, model, None, model.parameters(), None, None, 29500, Split(1), False, None, settings, (1, 1), None
    )[0]
    advance(made, 0, 1)
    return [
        made.global_steps,
        made.global_samples,
        (made.log_level(), deepspeed.utils.logger.getEffectiveLevel()),
        made.blocks is model.blocks,
        message_of(AttributeError, lambda: made.no_such_thing),
        message_of(ConfigError, lambda: deepspeed.initialize(model=model, config=settings, mpu=Split(2))),
        message_of(ConfigError, lambda: deepspeed.initialize(model=model, config=settings, mesh_param=(1, 2))),
    ]


def test_initialize_takes_deepspeeds_arguments(ranks):
    ((steps, samples, level, same, missing, mpu, mesh),) = ranks(1).run(initialize_as_deepspeed)
    assert (steps, samples, level, same) == (1, 2, ("ERROR", logging.ERROR), True)
    assert "neither the engine nor its module (Uneven)" in missing
    assert "expected a model-parallel world size of 1, got 2" in mpu and "sequence parallelism" in mesh


def use_names() -> tuple[list[str], int, float]:
    import runtime as deepspeed
    from runtime.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from runtime.utils import log_dist

    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    deepspeed.utils.logger.addHandler(handler)
    deepspeed.utils.logger.setLevel(logging.INFO)
    log_dist("to rank 1", ranks=[1])
    log_dist("to all", ranks=[-1])
    log_dist("to none")
    deepspeed.utils.logger.removeHandler(handler)
    deepspeed.comm.init_distributed("gloo")
    total = torch.ones(1)
    deepspeed.comm.all_reduce(total)
    deepspeed.comm.barrier()
    assert deepspeed.comm.get_rank() == deepspeed.comm.get_local_rank() and deepspeed.comm.is_initialized()
    assert deepspeed.ops.adam.FusedAdam is FusedAdam and DeepSpeedCPUAdam is not FusedAdam
    return heard, deepspeed.comm.get_world_size(), total.item()


def test_names_that_scripts_use(ranks):
    first, second = ranks(2).run(use_names)
    assert first == (["[Rank 0] to all"], 2, 2.0)
    assert second == (["[Rank 1] to rank 1", "[Rank 1] to all"], 2, 2.0)


def train_with(name: str, bias_correction: bool) -> dict[str, torch.Tensor]:
    import runtime as deepspeed

    model, settings = make("plain"), config(2, 1, clip=0.0)
    if name == "config":
        settings["optimizer"]["params"]["bias_correction"] = bias_correction
        optimizer = None
    else:
        del settings["optimizer"]
        numbers = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
        maker = getattr(deepspeed.ops.adam, name)
        optimizer = maker(model.parameters(), bias_correction=bias_correction, **numbers)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    advance(engine, 0, 4)
    return parameters(engine)


@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam"])
def test_deepspeeds_adams_are_ours(ranks, name):
    assert_equal(ranks(2).run(train_with, name, True)[0], train_plainly("plain", 2, 1, clip=0.0, steps=4))
    assert_equal(ranks(2).run(train_with, name, False)[0], ranks(2).run(train_with, "config", False)[0], tolerance=0)


# ---- boundaries ------------------------------------------------------------------------------------------------------
def count_by_hand(stage: int) -> tuple[dict[str, torch.Tensor], int, str]:
    """Accumulations of two micro-steps, as the config says, but with boundaries that the script sets."""
    import torch.distributed as dist

    engine = engine_for(config(stage, 2, clip=0.0))
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(4):
        for micro in range(2):
            engine.set_gradient_accumulation_boundary(micro == 1)
            engine.backward(engine(*micro_batch(step, micro, rank, world)))
            engine.step()
    found, steps = parameters(engine), engine.global_steps
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(*micro_batch(0, 0, rank, world)))
    engine.set_gradient_accumulation_boundary(True)
    return found, steps, message_of(RuntimeError, engine.step)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_boundaries_that_the_script_sets(ranks, stage):
    plain = train_plainly("plain", 2, 2, clip=0.0, steps=4)
    for ours, steps, error in ranks(2).run(count_by_hand, stage):
        assert_equal(ours, plain)
        assert steps == 4 and "call it before backward" in error


# ---- load_checkpoint -------------------------------------------------------------------------------------------------
class Grown(Uneven):
    """Has a layer more, and lacks one."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)
        self.register_buffer("count", torch.full((2,), 5.0))
        del self.norm
        self.norm = nn.Identity()


def states(engine) -> list[float]:
    return [float(rule.exp_avg.abs().sum()) for rule in engine.state.shard_optimizers]


def load_parts(folder: str, stage: int) -> dict[str, Any]:
    from runtime.engine.initialize import initialize

    settings = config(stage, 1, clip=0.0, **SCHEDULED)
    first = engine_for(settings)
    advance(first, 0, 4)
    first.save_checkpoint(folder, client_state={"epoch": 3}, save_latest=True)
    saved, found = parameters(first), {}

    def loaded(name: str, **arguments: bool) -> Any:
        engine = engine_for(settings)
        lr = engine.get_lr()
        path, client_state = engine.load_checkpoint(folder, **arguments)
        assert path is not None and client_state == {"epoch": 3}
        same = all(torch.equal(value, saved[key]) for key, value in parameters(engine).items())
        figures = (engine.global_steps, engine.state.counters.optimizer_steps, engine.skipped_steps)
        found[name] = (same, figures, states(engine) == states(first), engine.get_lr() == first.get_lr())
        assert engine.get_lr() == first.get_lr() or engine.get_lr() == lr
        return engine

    loaded("all")
    engine = loaded("no optimizer", load_optimizer_states=False)
    advance(engine, 4, 6)
    engine.save_checkpoint(f"{folder}-later")
    again = engine_for(settings)
    again.load_checkpoint(f"{folder}-later")
    found["later"] = (again.global_steps, again.optimizer_steps, again.skipped_steps)
    assert loaded("no scheduler", load_lr_scheduler_states=False).lr_scheduler.last_batch_iteration == -1
    assert loaded("module only", load_module_only=True).lr_scheduler.last_batch_iteration == -1

    torch.manual_seed(1)
    grown = initialize(model=Grown(), config=settings)[0]
    before = parameters(grown)
    found["strict"] = message_of(CheckpointError, lambda: grown.load_checkpoint(folder))
    grown.load_checkpoint(folder, load_module_strict=False)
    after = parameters(grown)
    found["kept"] = all(torch.equal(after[name], before[name]) for name in ("extra.weight", "extra.bias"))
    found["kept"] &= grown.module.count.tolist() == [5.0, 5.0]
    found["taken"] = all(torch.equal(after[name], saved[name]) for name in after if not name.startswith("extra"))
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_load_checkpoint_loads_what_is_asked_for(ranks, tmp_path, stage):
    for found in ranks(2).run(load_parts, str(tmp_path / "saved"), stage):
        assert found["all"] == (True, (4, 4, 0), True, True)
        assert found["no optimizer"] == (True, (4, 0, 0), False, True)  # the scheduler sets the rate
        assert found["later"] == (6, 2, 0)
        assert found["no scheduler"] == (True, (4, 4, 0), True, True)  # the optimizer's groups have it
        assert found["module only"] == (True, (0, 0, 0), False, False)
        assert "parameter extra.bias does not exist in the checkpoint" in found["strict"]
        assert found["kept"] and found["taken"]
