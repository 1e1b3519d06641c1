"""A host that runs ahead of its device while states are offloaded: engine.step() waits for nothing, and the numbers are
the same.

The device is played by the host, and stands still during engine.step(): whatever it was given since the last step does
not complete, neither a copy nor a sum, nor the last download of backward. Updates beside the training thread wait until
step() has returned. A training thread that waited for the device in step() would wait forever, so after a while that is
counted and the device goes on.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partialmethod
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
from runtime.offload.download import GradOffload
from runtime.optim.updates import LEARNING_STEPS
from runtime.wire.messages import Command
from runtime.zero import step_stats
from runtime.zero.flat import FlatParamGroup
from tests.harness import ROOT
from tests.harness.grids import pairwise
from tests.harness.waiting import patient
from tests.numerics.models import make
from tests.numerics.remote import LateStreamer, LateTransfers
from tests.numerics.test_running_ahead import equal, figures_of
from tests.numerics.training import config, micro_batch

STEPS = 10
OVERFLOWS = (4, 5, 8)
"""Steps at which the last rank's gradient overflows, the first ones after updates have begun to overlap."""
STUCK_S = 10.0
"""Seconds after which a training thread that waits for the device in step() is let go."""


class StandingDevice:
    """Completes work, but while it stands still only what it was given before it last went on."""

    def __init__(self, stuck_s: float) -> None:
        self._stuck_s = stuck_s
        self._still = False
        self._changed = threading.Condition()
        self.now = self.waits = 0
        self.holds_downloads = False
        """Whether it always stands still for downloads of gradients: it is as late as the training thread allows."""

    @contextlib.contextmanager
    def stands_still(self) -> Iterator[None]:
        self._still = not self.waits  # one wait is enough to fail
        released = threading.Timer(self._stuck_s, self._let_go)
        released.start()
        try:
            yield
        finally:
            released.cancel()
            self.go_on()

    def _let_go(self) -> None:
        self.waits += 1
        self.go_on()

    def go_on(self) -> None:
        """Complete what it was given."""
        with self._changed:
            self._still = False
            self.now += 1
            self._changed.notify_all()

    def reach(self, given: int, held: bool = False) -> None:
        """Called by whoever waits for work. given: `now` when the device was given it. held: whether it stands still
        for that anyway."""
        with self._changed:
            self._changed.wait_for(lambda: given < self.now or not (self._still or held))


class StandingCopy:
    """A copy, or a late update, that completes when the device runs."""

    def __init__(self, device: StandingDevice, copy: Any) -> None:
        self._device, self._copy, self._given = device, copy, device.now
        self._held = device.holds_downloads

    def wait_host(self) -> None:
        self._device.reach(self._given, self._held)
        self._copy.wait_host()

    def wait_device(self) -> None:
        self._copy.wait_device()  # the device orders its own work, and no thread waits


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


def send_late(offload: GradOffload, send: Any, device: StandingDevice, *arguments: Any) -> Any:
    """Send a gradient that does not arrive before the next one is sent, or step() is over."""
    device.go_on()
    device.holds_downloads = True
    try:
        return send(offload, *arguments)
    finally:
        device.holds_downloads = False


@contextlib.contextmanager
def step_of(engine: Any, device: StandingDevice, ahead: bool = True) -> Iterator[None]:
    """Around engine.step(): the device stands still, unless the step is settled at once."""
    if ahead and (engine.state.updates.will_overlap or engine.state.updates.executor is None):
        with device.stands_still():
            yield
    else:
        device.go_on()
        yield


@contextlib.contextmanager
def standing(ahead: bool, share: float = 0.0, stuck_s: float = patient(STUCK_S)) -> Iterator[StandingDevice]:
    """Engines made and trained inside are on a device of their own, of which each updates `share` of the states. ahead:
    whether sums arrive late, and the device alone knows what scripts have changed, so that step() may run ahead."""
    device, changed = StandingDevice(stuck_s), FlatParamGroup.changed_by_script
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (runtime.engine.build, "transfers_for", lambda _device: StandingTransfers(device)),
            (runtime.offload.placement, "streamer_for", lambda *_given: StandingStreamer(device)),
            (runtime.offload.placement, "_measured_share", lambda *_given: share),
        ):
            stack.enter_context(patch.object(owner, name, value))
        if ahead:
            stack.enter_context(patch.object(GradOffload, "send", partialmethod(send_late, GradOffload.send, device)))
            stack.enter_context(patch.object(step_stats, "arrive_late", lambda _device: True))
            stack.enter_context(patch.object(step_stats, "copy_to_host", lambda f: StandingFigures(device, f)))
            late = patch.object(FlatParamGroup, "changed_by_script", lambda flat: torch.as_tensor(changed(flat)))
            stack.enter_context(late)
        yield device


def settings_of(stage: int, precision: str, offload: dict[str, Any], section: dict[str, Any]) -> Any:
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 1e-3}}
    settings = config(stage, 2, clip=0.5, precision="fp32" if precision == "fp16" else precision, scheduler=scheduler)
    places: dict[str, Any] = {}
    if offload.get("optimizer", True):
        places["offload_optimizer"] = {"device": "cpu", "pin_memory": True, "ratio": offload.get("ratio", 1.0)}
    if offload.get("parameters"):
        places["offload_param"] = {"device": "cpu", "pin_memory": True}
    settings["zero_optimization"] = {**settings["zero_optimization"], **places}
    settings["zerotop"] = section
    if "grad_accum_dtype" in offload:
        settings["data_types"] = {"grad_accum_dtype": offload["grad_accum_dtype"]}
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
                    with step_of(engine, device, ahead):
                        engine.step()
                        in_flight += engine.state.updates.under_way
                losses.append(loss.item())
                if change and step in (5, 7):  # after a skipped step, and after one that was taken
                    engine.synchronize()
                    for parameter in engine.module.parameters():
                        parameter.data.clamp_(-0.05, 0.05)
            engine.synchronize()
            found = {
                "losses": losses,
                "parameters": {name: value.clone() for name, value in engine.module.state_dict().items()},
                "states": [
                    tensor[segment.start : segment.end].clone()  # without padding, which nobody reads
                    for one in engine.state.shard_optimizers
                    for tensor in (one.flat.masters, *(held.tensor for held in one.states()))
                    for segment in one.flat.segments
                ],
                **figures_of(engine, scheduler, heard),
            }
            engine.destroy()
        return {"waits": device.waits, "in_flight": in_flight, "found": found}
    finally:
        del os.environ[SHARED_MEMORY_VARIABLE]


def compare(ranks: Any, *what: Any) -> None:
    for ours, settled in zip(ranks(2).run(train, True, *what), ranks(2).run(train, False, *what), strict=True):
        assert ours["waits"] == 0
        assert ours["in_flight"] == (STEPS - LEARNING_STEPS if settled["in_flight"] else 0)
        assert ours["found"]["skipped"] == len(OVERFLOWS)
        for name, value in settled["found"].items():
            assert equal(ours["found"][name], value), name


CPU = {"offload": {"update": "cpu"}}
SHARES = {"cpu": (0.0, CPU), "gpu": (1.0, {"offload": {"update": "auto"}}),
          "split": (0.4, {"offload": {"update": "auto"}})}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "precision", "who"), pairwise([0, 1, 2, 3], ["fp32", "bf16", "fp16"], ["cpu", "gpu", "split"])
)
def test_the_same_bits_without_a_wait(ranks, stage, precision, who):
    share, section = SHARES[who]
    compare(ranks, stage, precision, share, {"parameters": stage == 3}, section)


@pytest.mark.parametrize(
    ("stage", "precision", "settings"),
    [
        (2, "bf16", {"ratio": 0.5}),
        (3, "fp16", {"ratio": 0.5, "parameters": True}),
        (2, "fp16", {"accumulate": "local"}),
        (2, "bf16", {"grad_accum_dtype": "bf16"}),
        (2, "bf16", {"optimizer_state_dtype": "bf16"}),
    ],
    ids=["some-on-the-device", "some-on-the-device-stage-3", "local", "bf16-gradients", "bf16-states"],
)
def test_the_same_bits_in_other_places_and_dtypes(ranks, stage, precision, settings):
    section = {key: value for key, value in settings.items() if key in ("accumulate", "optimizer_state_dtype")}
    compare(ranks, stage, precision, 0.0, settings, {**section, **CPU})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_parameters_alone_are_offloaded(ranks, precision):
    compare(ranks, 3, precision, 0.0, {"optimizer": False, "parameters": True}, {})


@pytest.mark.parametrize("who", ["cpu", "gpu", "split"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_masters_follow_what_a_script_changes(ranks, stage, who):
    share, section = SHARES[who]
    compare(ranks, stage, "bf16", share, {"ratio": 0.6}, section, True)


# ---- the played device itself -----------------------------------------------------------------------------------
def train_settling(stage: int) -> int:
    with standing(True, stuck_s=0.5) as device:
        engine = initialize(model=make("plain"), config=settings_of(stage, "bf16", {}, CPU))[0]
        engine.steps._can_run_ahead = lambda: False
        for step in range(3):
            for micro in range(2):
                engine.backward(engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size())))
                with device.stands_still():
                    engine.step()
        engine.destroy()
    return device.waits


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_settles_at_once_is_seen_to_wait(ranks, stage):
    assert min(ranks(2).run(train_settling, stage)) >= 1


# ---- what waits, and for what -----------------------------------------------------------------------------------
def steps_of(engine: Any, device: StandingDevice, count: int) -> None:
    first = engine.global_steps
    for step in range(first, first + count):
        for micro in range(2):
            engine.backward(engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size())))
            with step_of(engine, device):
                engine.step()


def obey() -> tuple[list[tuple[str, int]], int]:
    """A command that reaches rank 0 during the fifth step."""
    with standing(True, stuck_s=0.5) as device:
        engine = initialize(model=make("plain"), config=settings_of(2, "bf16", {}, CPU))[0]
        answers: list[tuple[str, int]] = []
        engine.session.link.ack = lambda ack: answers.append((ack.state, ack.step))
        steps_of(engine, device, 4)
        if dist.get_rank() == 0:
            command = Command(id="a", name="set", arguments={"lr_factor": 0.5}, number=1)
            engine.session.link.inbox.put(command)
        steps_of(engine, device, 3)
        assert engine.state.counters.lr_factor == 0.5
        engine.destroy()
    return answers, device.waits


def test_commands_apply_at_one_step_on_all_ranks(ranks):
    (answers, waits), (none, _) = ranks(2).run(obey)
    assert answers == [("applied", 6)] and none == []
    assert waits <= 1  # everything is settled for a command


def save_at_once(ahead: bool, folder: str) -> dict[str, Any]:
    """A checkpoint right after a step that was skipped, while nobody knows of that yet."""
    with standing(ahead) as device:
        engine = initialize(model=make("plain"), config=settings_of(2, "bf16", {}, CPU))[0]
        for step in range(5):
            for micro in range(2):
                loss = engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size()))
                engine.backward(loss * float("inf") if step == 4 else loss)
                with step_of(engine, device, ahead):
                    engine.step()
        assert ahead == engine.state.updates.under_way
        engine.save_checkpoint(folder)
        counters = engine.state.counters
        assert (counters.global_steps, counters.optimizer_steps) == (5, 4)
        engine.destroy()
        other = initialize(model=make("plain"), config=settings_of(1, "bf16", {}, CPU))[0]
        other.load_checkpoint(folder)
        found = {"parameters": {k: v.clone() for k, v in other.module.state_dict().items()}, "steps": vars(counters)}
        other.destroy()
    assert device.waits == 0
    return found


def test_a_checkpoint_right_after_a_step_waits_for_it(ranks, tmp_path):
    ours = ranks(2).run(save_at_once, True, str(tmp_path / "ahead"))
    settled = ranks(2).run(save_at_once, False, str(tmp_path / "settled"))
    assert equal(ours, settled)


def fail_beside() -> str:
    with standing(True) as device:
        engine = initialize(model=make("plain"), config=settings_of(2, "bf16", {}, CPU))[0]
        steps_of(engine, device, 3)

        def broken(*_given: Any) -> None:
            raise ZeroDivisionError("a download")

        for micro in range(2):
            engine.backward(engine(*micro_batch(3, micro, 0, 1)))
            if micro == 1:
                engine.state.grad_offload._slots[-1].job = engine.state.grad_offload.executor.submit(broken)
            with device.stands_still():
                engine.step()
        with pytest.raises(ZeroDivisionError, match="a download"):
            engine(*micro_batch(4, 0, 0, 1))
        with pytest.raises(ZeroDivisionError, match="a download"):
            engine.get_global_grad_norm()
        with pytest.raises(ZeroDivisionError, match="a download"):
            engine.destroy()
    return "raised"


def test_what_fails_beside_the_training_thread_is_raised_where_parameters_are_used(ranks):
    assert ranks(1).run(fail_beside) == ["raised"]


def may_run_ahead(**settings: Any) -> bool:
    with standing(True) as device:
        section = {"offload": {"update": "cpu", "overlap": settings.pop("overlap", True)}}
        given = {**settings_of(2, "bf16", {}, section), **settings}
        engine = initialize(model=make("plain"), config=given)[0]
        for step in range(LEARNING_STEPS + 1):
            for micro in range(2):
                engine.backward(engine(*micro_batch(step, micro, dist.get_rank(), dist.get_world_size())))
                device.go_on()
                engine.step()
        engine.synchronize()
        ahead: bool = engine.steps._can_run_ahead()
        if engine.lr_scheduler is not None and ahead:  # one that can't be undone
            engine.state.lr_scheduler = object()
            assert not engine.steps._can_run_ahead()
        engine.destroy()
    assert device.waits == 0
    return ahead


def may_run_ahead_with(settings: dict[str, Any]) -> bool:
    return may_run_ahead(**settings)


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [
        ({}, True),
        ({"overlap": False}, False),
        ({"optimizer": {"type": "Adagrad", "params": {"lr": 1e-3}}}, False),
    ],
    ids=["adamw", "without-overlap", "another-optimizer"],
)
def test_a_step_is_settled_at_once_where_the_training_thread_is_needed(ranks, settings, ahead):
    assert ranks(2).run(may_run_ahead_with, settings) == [ahead, ahead]


ENDS = """
from tests.numerics import test_running_ahead_offloaded as here
from runtime.comm import init_distributed

init_distributed("gloo")
with here.standing(True) as device:
    engine = here.initialize(model=here.make("plain"), config=here.settings_of(2, "bf16", {}, here.CPU))[0]
    here.steps_of(engine, device, 4)
    assert engine.state.updates.under_way
    print("ends")
"""


def test_a_process_may_end_with_an_update_in_flight():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 0 and done.stdout.endswith("ends\n") and "Error" not in done.stderr, done.stderr
