"""A host that runs ahead of its device while states are offloaded: engine.step() waits for nothing, and the numbers are
the same.

The device is played by the host, and stands still during engine.step(): whatever it was given since the last step does not
complete, neither a copy nor a sum. Updates beside the training thread wait until step() has returned; a training thread
that waited for the device in step() would wait forever, so after a while that is counted, and the device runs on.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import runtime.engine.build
import runtime.offload.placement
from runtime.comm.group import SHARED_MEMORY_VARIABLE
from runtime.config import Fp16Config, load
from runtime.engine.initialize import initialize
from runtime.optim.updates import LEARNING_STEPS
from runtime.wire.messages import Command
from runtime.zero import step_stats
from runtime.zero.flat import FlatParamGroup
from tests.harness.grids import pairwise
from tests.harness.waiting import patient
from tests.numerics.models import make
from tests.numerics.remote import LateStream, LateStreamer, LateTransfers
from tests.numerics.test_running_ahead import equal
from tests.numerics.training import config, micro_batch

STEPS = 20
OVERFLOWS = (4, 5, 11)
"""Steps at which the last rank's gradient overflows, the first ones after updates have begun to overlap."""
STUCK_S = 20.0
"""Seconds after which a training thread that waits for the device in step() is let go."""


class StandingDevice:
    """Completes work, but while it stands still only what it was given before it last ran."""

    def __init__(self) -> None:
        self._runs = threading.Event()
        self._runs.set()
        self.now = self.waits = 0

    @contextlib.contextmanager
    def stands_still(self) -> Iterator[None]:
        self._runs.clear()
        released = threading.Timer(patient(STUCK_S), self._let_go)
        released.start()
        try:
            yield
        finally:
            released.cancel()
            self.now += 1
            self._runs.set()

    def _let_go(self) -> None:
        self.waits += 1
        self._runs.set()

    def reach(self, given: int) -> None:
        """Called by whoever waits for work. given: `now` when the device was given it."""
        if given == self.now:
            self._runs.wait()


class StandingCopy:
    """A copy, or a late update, that completes when the device runs."""

    def __init__(self, device: StandingDevice, copy: Any) -> None:
        self._device, self._copy, self._given = device, copy, device.now

    def wait_host(self) -> None:
        self._device.reach(self._given)
        self._copy.wait_host()

    wait_device = wait_host


class StandingFigures:
    """Sums on their way to the host."""

    def __init__(self, device: StandingDevice, figures: torch.Tensor) -> None:
        self._device, self._figures, self._given = device, figures.clone(), device.now

    def wait(self) -> list[float]:
        self._device.reach(self._given)
        return self._figures.tolist()


class StandingTransfers(LateTransfers):
    def __init__(self, device: StandingDevice) -> None:
        super().__init__()
        self._device = device

    def down(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Any:
        return StandingCopy(self._device, super().down(source, target, after))

    def up(self, source: torch.Tensor, target: torch.Tensor, after: Any) -> Any:
        return StandingCopy(self._device, super().up(source, target, after))


class StandingStreamer(LateStreamer):
    def __init__(self, device: StandingDevice) -> None:
        super().__init__()
        self._device = device

    def update(self, *arguments: Any) -> Any:
        return StandingCopy(self._device, super().update(*arguments))


@contextlib.contextmanager
def standing(ahead: bool, share: float) -> Iterator[StandingDevice]:
    """Engines made and trained inside are on a device of their own, of which each updates `share` of the states. ahead:
    whether sums arrive late, and the device alone knows what scripts have changed, so that step() may run ahead."""
    device, changed = StandingDevice(), FlatParamGroup.changed_by_script
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (runtime.engine.build, "transfers_for", lambda _device: StandingTransfers(device)),
            (runtime.offload.placement, "streamer_for", lambda *_given: StandingStreamer(device)),
            (runtime.offload.placement, "_measured_share", lambda *_given: share),
        ):
            stack.enter_context(patch.object(owner, name, value))
        if ahead:
            stack.enter_context(patch.object(step_stats, "arrive_late", lambda _device: True))
            stack.enter_context(patch.object(step_stats, "copy_to_host", lambda f: StandingFigures(device, f)))
            late = patch.object(FlatParamGroup, "changed_by_script", lambda flat: torch.as_tensor(changed(flat)))
            stack.enter_context(late)
        yield device


def settings_of(stage: int, precision: str, offload: dict[str, Any], section: dict[str, Any]) -> Any:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-3}}
    settings = config(stage, 2, clip=0.5, precision="fp32" if precision == "fp16" else precision, scheduler=scheduler)
    places = {"offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": offload.get("ratio", 1.0)}}
    if offload.get("parameters"):
        places["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings["zero_optimization"] = {**settings["zero_optimization"], **places}
    settings["zerotop"] = section
    if precision != "fp16":
        return settings
    resolved = load(settings).resolve(dist.get_world_size(), "cpu", script=True)
    scaling = Fp16Config(initial_scale_power=10, loss_scale_window=3, hysteresis=1)
    return resolved.model_copy(update={"precision": "fp16", "fp16": scaling})


def train(
    ahead: bool,
    stage: int,
    precision: str,
    share: float,
    offload: dict[str, Any],
    section: dict[str, Any],
    change: bool = False,
) -> dict[str, Any]:
    """What a training leaves, and how often step() waited for the device."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ[SHARED_MEMORY_VARIABLE] = "0"  # sums are rounded as a device's are
    try:
        with standing(ahead, share) as device:
            engine, _, _, scheduler = initialize(
                model=make("plain"), config=settings_of(stage, precision, offload, section)
            )
            heard: list[Any] = []
            engine.telemetry.step = heard.append
            losses, in_flight = [], 0
            for step in range(STEPS):
                for micro in range(2):
                    loss = engine(*micro_batch(step, micro, rank, world))
                    overflows = step in OVERFLOWS and rank == world - 1 and micro == 0
                    engine.backward(loss * float("inf") if overflows else loss)
                    with device.stands_still() if ahead and step >= LEARNING_STEPS else contextlib.nullcontext():
                        engine.step()
                        in_flight += engine.state.updates.under_way
                losses.append(loss.item())
                if change and step in (5, 6):  # after a skipped step, and after one that was taken
                    engine.synchronize()
                    for parameter in engine.module.parameters():
                        parameter.data.clamp_(-0.05, 0.05)
            engine.synchronize()
            found = {
                "losses": losses,
                "parameters": {name: value.clone() for name, value in engine.module.state_dict().items()},
                "masters": [masters.clone() for masters in engine.masters()],
                "states": [held.tensor.clone() for one in engine.state.shard_optimizers for held in one.states()],
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
            engine.destroy()
        return {"waits": device.waits, "in_flight": in_flight, "found": found}
    finally:
        del os.environ[SHARED_MEMORY_VARIABLE]


def compare(ranks: Any, *what: Any) -> None:
    for ours, settled in zip(
        ranks(2).run(train, True, *what), ranks(2).run(train, False, *what), strict=True
    ):
        assert ours["waits"] == 0
        assert ours["in_flight"] == STEPS - LEARNING_STEPS
        assert ours["found"]["skipped"] == len(OVERFLOWS)
        for name, value in settled["found"].items():
            assert equal(ours["found"][name], value), name


SHARES = {"cpu": (0.0, {"offload": {"update": "cpu"}}), "gpu": (1.0, {"offload": {"update": "auto"}}),
          "split": (0.4, {"offload": {"update": "auto"}})}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "precision", "who"), pairwise([0, 1, 2, 3], ["fp32", "bf16", "fp16"], ["cpu", "gpu", "split"])
)
def test_the_same_bits_without_a_wait(ranks, stage, precision, who):
    share, section = SHARES[who]
    compare(ranks, stage, precision, share, {"parameters": stage == 3}, section)
