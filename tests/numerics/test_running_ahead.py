"""A host that runs ahead of its device: engine.step() waits for nothing, and the numbers are the same.

The device is played: the sums over ranks arrive on the host when the next backward has begun, and whoever wants them
earlier would have waited for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from runtime.config import Fp16Config, load
from runtime.engine.initialize import initialize
from runtime.wire.messages import Command
from runtime.zero import step_stats
from runtime.zero.flat import FlatParamGroup
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch

STEPS = 8
OVERFLOWS = (2, 3, 6)
"""Steps at which rank 1's gradient overflows."""


class PlayedDevice:
    """Counts backwards as time, and waits for what has not arrived."""

    def __init__(self) -> None:
        self.now = self.waits = self.copies = 0

    def copy(self, figures: torch.Tensor) -> LateCopy:
        self.copies += 1
        return LateCopy(self, figures.clone())


class LateCopy:
    def __init__(self, device: PlayedDevice, figures: torch.Tensor) -> None:
        self._device, self._figures, self._arrives = device, figures, device.now + 1

    def wait(self) -> list[float]:
        self._device.waits += self._device.now < self._arrives
        return self._figures.tolist()


@contextlib.contextmanager
def played() -> Iterator[PlayedDevice]:
    """Engines made and trained inside run on a played device, which alone knows what scripts have changed, too."""
    device, changed = PlayedDevice(), FlatParamGroup.changed_by_script
    with (
        patch.object(step_stats, "arrive_late", lambda _device: True),
        patch.object(step_stats, "copy_to_host", device.copy),
        patch.object(FlatParamGroup, "changed_by_script", lambda flat: torch.as_tensor(changed(flat))),
    ):
        yield device


def settings_of(stage: int, precision: str) -> Any:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-3}}
    if precision != "fp16":
        return config(stage, 2, clip=0.5, precision=precision, scheduler=scheduler)
    resolved = load(config(stage, 2, clip=0.5, scheduler=scheduler)).resolve(dist.get_world_size(), "cpu", script=True)
    scaling = Fp16Config(initial_scale_power=10, loss_scale_window=3, hysteresis=1)
    return resolved.model_copy(update={"precision": "fp16", "fp16": scaling})


def train(stage: int, precision: str, ahead: bool, change: bool = False) -> dict[str, Any]:
    """What a training leaves, and how often it waited for the device."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with played() if ahead else contextlib.nullcontext(PlayedDevice()) as device:
        engine, _, _, scheduler = initialize(model=make("plain"), config=settings_of(stage, precision))
        heard: list[Any] = []
        engine.telemetry.step = heard.append
        for step in range(STEPS):
            for micro in range(2):
                loss = engine(*micro_batch(step, micro, rank, world))
                device.now += 1
                overflows = step in OVERFLOWS and rank == 1 and micro == 0
                engine.backward(loss * float("inf") if overflows else loss)
                engine.step()
            if change and step in (3, 4):  # a skipped step, and one that is taken
                for parameter in engine.module.parameters():
                    parameter.data.clamp_(-0.05, 0.05)
        waits = device.waits
        found = {
            "parameters": {name: value.clone() for name, value in engine.module.state_dict().items()},
            "masters": [masters.clone() for masters in engine.masters()],
            **figures_of(engine, scheduler, heard),
        }
        assert device.copies == (STEPS if ahead else 0)
        engine.destroy()
    return {"waits": waits, "found": found}


def figures_of(engine: Any, scheduler: Any, heard: list[Any]) -> dict[str, Any]:
    """What an engine says after its last step, and the results that it has reported, without their times."""
    return {
        "skipped": engine.skipped_steps,
        "norm": engine.get_global_grad_norm(),
        "lr": engine.get_lr(),
        "schedule": scheduler.state_dict(),
        "scale": engine.loss_scale,
        "results": [
            {**result.model_dump(), **dict.fromkeys(("step_ms", "tokens_per_s", "samples_per_s", "end_ns"))}
            for result in heard
        ],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or (one != one and other != other)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_without_a_wait(ranks, stage, precision):
    for ours, plain in zip(
        ranks(2).run(train, stage, precision, True), ranks(2).run(train, stage, precision, False), strict=True
    ):
        assert ours["waits"] == 0
        assert ours["found"]["skipped"] == len(OVERFLOWS)
        for name, value in plain["found"].items():
            assert equal(ours["found"][name], value), name


@pytest.mark.parametrize("stage", [0, 2])
def test_masters_follow_what_a_script_changes(ranks, stage):
    for ours, plain in zip(
        ranks(2).run(train, stage, "bf16", True, True), ranks(2).run(train, stage, "bf16", False, True), strict=True
    ):
        assert ours["waits"] == 0
        for name in ("parameters", "masters"):
            assert equal(ours["found"][name], plain["found"][name]), name


def obey() -> tuple[list[tuple[str, int]], int]:
    """A command that reaches rank 0 during step 3; and a query between two steps, which may wait."""
    with played() as device:
        engine = initialize(model=make("plain"), config=config(2, 1, clip=0.5))[0]
        answers: list[tuple[str, int]] = []
        engine.session.link.ack = lambda ack: answers.append((ack.state, ack.step))
        for step in range(6):
            loss = engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size()))
            device.now += 1
            engine.backward(loss)
            if step == 2 and dist.get_rank() == 0:
                command = Command(id="a", name="set", arguments={"lr_factor": 0.5}, number=1)
                engine.session.link.inbox.put(command)
            engine.step()
        waits = device.waits
        assert engine.state.counters.lr_factor == 0.5
        assert engine.get_global_grad_norm() > 0
        engine.destroy()
    return answers, waits


def test_commands_apply_at_one_step_on_all_ranks(ranks):
    (answers, waits), (none, _) = ranks(2).run(obey)
    assert answers == [("applied", 4)] and none == []
    assert waits == 1  # a command is obeyed between two steps: everything is settled for it
