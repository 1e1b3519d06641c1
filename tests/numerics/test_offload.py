"""Offloaded optimizer states and parameters: the same bits as without, at every stage, overlapped or not, whatever
stays on the device; and parameters that are read only when they are there."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import runtime.offload.placement
from runtime import zero
from runtime.comm.group import SHARED_MEMORY_VARIABLE
from runtime.config import ConfigError, load
from runtime.engine.initialize import initialize
from runtime.host.memory_limits import Limits, check_host_memory
from tests.harness.grids import pairwise
from tests.harness.waiting import patient
from tests.numerics.models import Uneven, make
from tests.numerics.remote import remote_device
from tests.numerics.training import assert_equal, config, micro_batch, train_plainly, train_with_engine

STEPS = 6


def offloaded(settings: dict[str, Any], overlap: bool = True, ratio: float = 1.0) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": True, "ratio": ratio}
    zero = {**settings["zero_optimization"], "offload_optimizer": place}
    if zero["stage"] == 3:
        zero["offload_param"] = {"device": "cpu"}
    return {**settings, "zero_optimization": zero, "zerotop": {"offload": {"overlap": overlap}}}


def train(kind: str, settings: dict[str, Any], steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    whole, losses, _ = train_with_engine(kind, settings, steps)
    return whole, losses


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Of every rank."""
    for (mine, my_losses), (other, other_losses) in zip(ours, theirs, strict=True):
        assert my_losses == other_losses
        for name, value in other.items():
            assert torch.equal(mine[name], value), name


@pytest.mark.parametrize(
    ("world", "stage", "precision", "overlap"), pairwise([1, 2], [0, 1, 2, 3], ["fp32", "bf16"], [True, False])
)
def test_the_same_bits_as_without_offload(ranks, reference, world, stage, precision, overlap):
    settings = config(stage, 2, clip=0.5, precision=precision)
    resident = reference(world, train, "plain", settings)
    assert_same_bits(ranks(world).run(train, "plain", offloaded(settings, overlap)), resident)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.8])
def test_whatever_stays_on_the_device(ranks, reference, ratio):
    settings = config(2, 1, clip=0.5, precision="bf16")
    resident = reference(2, train, "plain", settings)
    assert_same_bits(ranks(2).run(train, "plain", offloaded(settings, ratio=ratio)), resident)


@pytest.mark.parametrize("kind", ["tied", "frozen", "unused", "flatland", "winding", "nested", "checkpointed"])
@pytest.mark.parametrize("stage", [2, 3])
def test_awkward_models(ranks, kind, stage):
    settings = config(stage, 2, clip=0.0)
    resident = ranks(2).run(train, kind, settings)
    assert_same_bits(ranks(2).run(train, kind, offloaded(settings)), resident)


def test_parity_with_plain_adamw(ranks):
    plain = train_plainly("plain", 2, 3, clip=0.5)
    for ours, _, _ in ranks(2).run(train_with_engine, "plain", offloaded(config(2, 3, clip=0.5))):
        assert_equal(ours, plain)


def test_other_optimizers(ranks):
    settings = config(2, 1, clip=0.5, optimizer="Adagrad")
    resident = ranks(2).run(train, "plain", settings)
    assert_same_bits(ranks(2).run(train, "plain", offloaded(settings)), resident)


# ---- a device that is not the host ----------------------------------------------------------------------
def train_remotely(
    copies: str, kind: str, settings: dict[str, Any], share: float | None = None
) -> tuple[dict[str, torch.Tensor], list[float]]:
    with remote_device(copies, share):
        return train_over_gloo(kind, settings)


def train_over_gloo(kind: str, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Sums are rounded to the precision that travels, as a GPU's are; ranks that share memory add in fp32."""
    os.environ[SHARED_MEMORY_VARIABLE] = "0"
    try:
        return train(kind, settings)
    finally:
        del os.environ[SHARED_MEMORY_VARIABLE]


@pytest.mark.parametrize(
    ("world", "stage", "precision", "copies", "overlap"),
    pairwise([1, 2], [0, 1, 2, 3], ["fp32", "bf16"], ["late", "prompt"], [True, False]),
)
def test_copies_are_waited_for(ranks, reference, world, stage, precision, copies, overlap):
    settings = config(stage, 2, clip=0.5, precision=precision)
    resident = reference(world, train_over_gloo, "plain", settings)
    assert_same_bits(ranks(world).run(train_remotely, copies, "plain", offloaded(settings, overlap)), resident)


@pytest.mark.parametrize("kind", ["tied", "unused", "winding", "checkpointed", "mixed"])
def test_awkward_models_on_a_device(ranks, kind):
    settings = config(2, 3, clip=0.5)
    resident = ranks(2).run(train_over_gloo, kind, settings)
    assert_same_bits(ranks(2).run(train_remotely, "late", kind, offloaded(settings, ratio=0.5)), resident)


@pytest.mark.parametrize(("stage", "precision", "share"), pairwise([1, 2, 3], ["fp32", "bf16"], [0.0, 0.3, 1.0]))
def test_any_split_between_cpu_and_device_gives_the_same_bits(ranks, reference, stage, precision, share):
    settings = config(stage, 2, clip=0.5, precision=precision)
    resident = reference(2, train_over_gloo, "plain", settings)
    assert_same_bits(ranks(2).run(train_remotely, "late", "plain", offloaded(settings), share), resident)


# ---- reading while an update is under way ---------------------------------------------------------------
def read_in_between(stage: int, how: str) -> None:
    """The update is held up until somebody waits for it."""
    settings = config(stage, 1, clip=0.0)
    plain, ours = (initialize(model=make("plain"), config=c)[0] for c in (settings, offloaded(settings)))
    began = threading.Event()
    for rule in ours.state.shard_optimizers:
        rule.update = partial(_after, began, rule.update)
    for step in range(5):
        began.set()
        for engine in (plain, ours):
            loss = engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size()))
            engine.backward(loss)
        ours.synchronize()
        began.clear()
        if step < 2:
            began.set()  # these do not overlap
        ours.step()
        plain.step()
        assert step < 2 or any(not job.done() for job in ours.state.updates._jobs if job is not None)
        began.set()
        expected = {name: value.clone() for name, value in plain.module.state_dict().items()}
        if how == "state_dict":
            seen = ours.module.state_dict()
        elif how == "gathered":
            with zero.GatheredParameters(ours.module):
                seen = {name: parameter.detach().clone() for name, parameter in ours.module.named_parameters()}
        elif how == "synchronize":
            ours.synchronize()
            seen = {name: parameter.detach().clone() for name, parameter in ours.module.named_parameters()}
        else:
            with torch.no_grad():
                inputs = micro_batch(99, 0, 0, 1)
                assert torch.equal(ours.module(*inputs), plain.module(*inputs))
            seen = ours.module.state_dict()
        for name, value in expected.items():
            assert torch.equal(seen[name], value), (step, name)


def _after(began: threading.Event, update: Any, *arguments: Any) -> None:
    assert began.wait(patient(60))
    update(*arguments)


@pytest.mark.parametrize(
    ("stage", "how"),
    [(2, "state_dict"), (3, "state_dict"), (2, "gathered"), (3, "gathered"), (1, "synchronize"), (2, "evaluation")],
)
def test_whoever_reads_waits_for_the_update(ranks, stage, how):
    ranks(2).run(read_in_between, stage, how)


class ByHand(Uneven):
    """Uses its head's weight without calling the head; from step `later` on also the second block's."""

    later = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for block in (self.blocks[0], self.blocks[2]):
            x = block(x)
        if self.calls >= self.later:
            x = x + F.linear(F.linear(x, self.blocks[1].up.weight), self.blocks[1].down.weight)
        self.calls += 1
        return F.cross_entropy(F.linear(self.norm(x), self.head.weight).float().flatten(0, 1), targets.flatten())


def by_hand(settings: dict[str, Any], later: int) -> list[float]:
    torch.manual_seed(7)
    model = ByHand()
    model.later = later
    engine = initialize(model=model, config=settings)[0]
    losses = []
    for step in range(6):
        loss = engine(*micro_batch(step, 0, 0, 1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_parameters_used_outside_their_modules_forward(ranks):
    settings = config(2, 1, clip=0.0)
    assert ranks(2).run(by_hand, offloaded(settings), 0) == ranks(2).run(by_hand, settings, 0)


def test_parameters_used_outside_for_the_first_time_later(ranks):
    settings = config(2, 1, clip=0.0)
    assert ranks(2).run(by_hand, offloaded(settings), 4) == ranks(2).run(by_hand, settings, 4)


class Quantized(nn.Module):
    """Frozen values in dtypes that Gloo does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scales = nn.Parameter(torch.arange(16).to(torch.float8_e4m3fn), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(8) % 2 == 0, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.mask).square().mean() * self.scales.float().mean()


def quantized(settings: dict[str, Any]) -> float:
    torch.manual_seed(7)
    engine = initialize(model=Quantized(), config=settings)[0]
    for _ in range(2):
        loss = engine(torch.ones(2, 8))
        engine.backward(loss)
        engine.step()
    return loss.item()


def test_frozen_parameters_of_any_dtype(ranks):
    settings = config(3, 1, clip=0.0)
    assert ranks(2).run(quantized, offloaded(settings)) == ranks(2).run(quantized, settings)


def infinite_gradient(settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    engine = initialize(model=make("plain"), config=settings)[0]
    for step in range(5):
        loss = engine(*micro_batch(step, 0, dist.get_rank(), 2))
        engine.backward(loss * float("inf") if step == 3 else loss)
        engine.step()
    assert engine.skipped_steps == 1
    return {name: value.clone() for name, value in engine.module.state_dict().items()}, [loss.item()]


def test_skipped_steps_change_nothing(ranks):
    settings = config(2, 1, clip=0.5, precision="bf16")
    assert_same_bits(ranks(2).run(infinite_gradient, offloaded(settings)), ranks(2).run(infinite_gradient, settings))


def failing_update() -> str:
    engine = initialize(model=make("plain"), config=offloaded(config(2, 1, clip=0.0)))[0]

    def fail(*_arguments: Any) -> None:
        raise MemoryError("no memory for the update")

    for step in range(3):
        if step == 2:
            engine.state.shard_optimizers[1].update = fail
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), 1)))
        engine.step()
    with pytest.raises(MemoryError, match="for the update") as caught:
        engine(*micro_batch(3, 0, dist.get_rank(), 1))
    return str(caught.value)


def refused(optimizer: str, update: str, pin: bool) -> str:
    settings = offloaded(config(2, 1, clip=0.0, optimizer=optimizer))
    settings["zero_optimization"]["offload_optimizer"]["pin_memory"] = pin
    resolved = load(settings).resolve(1, "cpu", script=True)  # with "gpu" it would be refused here already
    section = resolved.zerotop.offload.model_copy(update={"update": update})
    resolved = resolved.model_copy(update={"zerotop": resolved.zerotop.model_copy(update={"offload": section})})
    with remote_device("late"), pytest.raises(ConfigError) as caught:
        initialize(model=make("plain"), config=resolved)
    return str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "pin", "message"),
    [
        ("Adagrad", True, '"gpu" supports AdamW and Adam only'),
        ("AdamW", False, "offload_optimizer.pin_memory to true"),
        ("AdamW", True, "needs the CUDA kernels"),
    ],
)
def test_what_the_gpu_cannot_update(ranks, optimizer, pin, message):
    assert message in ranks(1).run(refused, optimizer, "gpu", pin)[0]


def too_little_memory() -> str:
    runtime.offload.placement.check_host_memory = partial(check_host_memory, limits=Limits(1000.0, 0, inf, inf, inf))
    try:
        with pytest.raises(ConfigError) as caught:
            initialize(model=make("plain"), config=offloaded(config(2, 1, clip=0.0)))
    finally:
        runtime.offload.placement.check_host_memory = check_host_memory
    return str(caught.value)


def test_too_little_host_memory_is_said_before_anything_is_taken(ranks):
    for text in ranks(2).run(too_little_memory):
        assert text.startswith("zero_optimization.offload_optimizer: offload needs ")
        assert "but this machine has only" in text


def test_an_error_in_the_update_reaches_the_script(ranks):
    assert ranks(1).run(failing_update) == ["no memory for the update"]


def dropped_meanwhile() -> None:
    """A script keeps the module only, while the last update is still under way."""
    settings = config(2, 1, clip=0.0)
    plain, ours = (initialize(model=make("plain"), config=c)[0] for c in (settings, offloaded(settings)))
    began = threading.Event()
    for rule in ours.state.shard_optimizers:
        rule.update = partial(_after, began, rule.update)
    for step in range(4):
        began.set()
        for engine in (plain, ours):
            engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), 2)))
        if step == 3:
            began.clear()
        ours.step()
        plain.step()
    module, gone = ours.module, weakref.ref(ours.state)
    del engine, ours, rule
    gc.collect()
    assert gone() is not None
    began.set()
    for name, value in module.state_dict().items():
        assert torch.equal(value, plain.module.state_dict()[name]), name
    gc.collect()
    assert gone() is None


def test_an_engine_that_is_dropped_finishes_its_update(ranks):
    ranks(2).run(dropped_meanwhile)


def who_settles(folder: str) -> None:
    """What touches host memory from the script's thread waits for the device, too."""
    with remote_device("late", 0.5):
        engine = initialize(model=make("plain"), config=offloaded(config(2, 1, clip=0.0)))[0]
    settled: list[int] = []
    engine.state.transfers.settle = lambda: settled.append(engine.global_steps)
    for step in range(3):
        engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), 2)))
        engine.step()
    assert not settled  # training itself never does
    engine.synchronize()
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    assert settled == [3] * 3


def test_who_reads_states_waits_for_the_device(ranks, tmp_path):
    ranks(2).run(who_settles, str(tmp_path))
