"""What a run goes on with beside the numbers of the model: data position and random numbers of every kind, on every
rank, bit for bit."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from runtime.engine import Engine
from tests.numerics.training import config

SAMPLES = 60
HALF = 4


class Dropping(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(9, 17), nn.Linear(17, 5)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(F.dropout(F.gelu(self.first(inputs)), 0.3)), targets)


def dataset() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(SAMPLES, 9, generator=generator)
    return torch.utils.data.TensorDataset(inputs, torch.arange(SAMPLES) % 5, torch.arange(SAMPLES))


class Script:
    """A training script with a generator of each kind, seeded by rank where it augments."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from runtime.engine.initialize import initialize

        rank = dist.get_rank()
        torch.manual_seed(0)
        model = Dropping()
        torch.manual_seed(100 + rank)  # dropout differs between ranks
        random.seed(rank)
        np.random.seed(rank)
        self.engine, _, self.loader, _ = initialize(model=model, config=settings, training_data=dataset())
        self.generators = {
            "by_torch": torch.Generator().manual_seed(rank),
            "by_numpy": np.random.default_rng(rank),
            "by_philox": np.random.Generator(np.random.Philox(rank)),
            "by_mersenne": np.random.Generator(np.random.MT19937(rank)),
            "by_state": np.random.RandomState(rank),
            "by_python": random.Random(rank),
            "shared": np.random.default_rng(5),
        }
        self.engine.register_state(**self.generators)
        self.seen: list[list[int]] = []
        self.losses: list[float] = []

    def draw(self) -> list[float]:
        """From every generator; the Gaussian ones keep half of a pair."""
        own = self.generators
        return [
            torch.rand(1).item(),
            random.gauss(0, 1),
            float(np.random.normal()),
            torch.rand(1, generator=own["by_torch"]).item(),
            float(own["by_numpy"].normal()),
            float(own["by_philox"].random(dtype=np.float32)),
            float(own["by_mersenne"].random()),
            float(own["by_state"].normal()),
            own["by_python"].gauss(0, 1),
            float(own["shared"].random()),
        ]

    def run(self, steps: int) -> list[list[float]]:
        """Up to optimizer step `steps`; what was drawn in each micro-step."""
        drawn = []
        while True:
            for inputs, targets, numbers in self.loader:
                drawn.append(self.draw())
                noise = torch.rand(inputs.shape, generator=self.generators["by_torch"])
                loss = self.engine(inputs + 0.1 * noise, targets)
                self.engine.backward(loss)
                self.engine.step()
                self.seen.append(numbers.tolist())
                self.losses.append(loss.item())
                if self.engine.global_steps == steps:
                    return drawn

    def outcome(self) -> tuple[list[list[int]], list[float], dict[str, torch.Tensor]]:
        return self.seen, self.losses, {n: v.clone() for n, v in self.engine.module.state_dict().items()}


def unbroken(folder: str, settings: dict[str, Any], wait: bool) -> Any:
    script = Script(settings)
    script.run(HALF)
    script.engine.save_checkpoint(folder, wait=wait)
    script.seen.clear()
    script.losses.clear()
    drawn = script.run(3 * HALF)
    script.engine.wait_for_checkpoint()
    return drawn, *script.outcome()


def resumed(folder: str, settings: dict[str, Any], way: str) -> Any:
    """way: loaded by a fresh script, by one that has been somewhere else, or by initialize() under --resume."""
    if way == "launch":
        with under_resume(folder):
            script = Script(settings)
        assert script.engine.global_steps == HALF
        return script.run(3 * HALF), *script.outcome()
    script = Script(settings)
    if way == "later":
        script.run(2)
        script.seen.clear()
        script.losses.clear()
    script.engine.load_checkpoint(folder)
    return script.run(3 * HALF), *script.outcome()


@contextlib.contextmanager
def under_resume(folder: str) -> Iterator[None]:
    original = Engine.resume

    def resume(engine: Engine) -> Path | None:
        engine.autosave.folder, engine.session.resume = Path(folder), True
        try:
            return original(engine)
        finally:
            engine.autosave.folder, engine.session.resume = None, False

    Engine.resume = resume  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.resume = original  # type: ignore[method-assign]


@pytest.mark.parametrize(("stage", "wait", "way"), [(0, True, "fresh"), (2, False, "later"), (3, True, "launch")])
def test_dropout_data_and_all_generators_continue_bit_for_bit_on_all_ranks(ranks, tmp_path, stage, wait, way):
    settings = config(stage, 2, clip=0.5)
    theirs = ranks(3).run(unbroken, str(tmp_path), settings, wait)
    ours = ranks(3).run(resumed, str(tmp_path), settings, way)
    for (drawn, seen, losses, whole), (drawn_again, seen_again, losses_again, whole_again) in zip(
        theirs, ours, strict=True
    ):
        assert (drawn_again, seen_again, losses_again) == (drawn, seen, losses)
        assert all(torch.equal(whole_again[name], whole[name]) for name in whole)
    assert len({str(drawn[0][:9]) for drawn, *_ in theirs}) == 3  # what was to be kept apart, was
    assert len({drawn[0][9] for drawn, *_ in theirs}) == 1


def drawn_at(folder: str, settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """What a rank draws first: fresh, and behind the checkpoint."""
    fresh = Script(settings).draw()
    script = Script(settings)
    script.engine.load_checkpoint(folder)
    return fresh, script.draw()


def test_ranks_that_are_new_keep_their_own_generators_but_join_shared_ones(ranks, tmp_path):
    two = ranks(2).run(unbroken, str(tmp_path), config(1, 1, clip=0.0), True)
    three = ranks(3).run(drawn_at, str(tmp_path), config(1, 1, clip=0.0))
    for rank in (0, 1):
        assert three[rank][1] == two[rank][0][0]
    fresh, behind = three[2]
    assert behind[:9] == fresh[:9] and behind[9] == two[0][0][0][9] != fresh[9]


def misfits(folder: str) -> list[str]:
    from runtime.checkpoint import CheckpointError
    from tests.numerics.training import message_of

    script = Script(config(1, 1, clip=0.0))
    script.engine.save_checkpoint(folder)
    script.engine.load_checkpoint(folder)
    engine = script.engine
    other = np.random.Generator(np.random.MT19937(1))
    strange = (3, random.SystemRandom())
    found = [message_of(TypeError, lambda bad=bad: engine.register_state(strange=bad)) for bad in strange]
    found.append(message_of(ValueError, lambda: engine.register_state(**{"zerotop:data": script.loader})))
    fresh = Script(config(1, 1, clip=0.0)).engine
    fresh.register_state(by_numpy=other)
    fresh.global_steps = 77
    found.append(message_of(CheckpointError, lambda: fresh.load_checkpoint(folder)))
    assert fresh.global_steps == 77
    fresh = Script(config(1, 1, clip=0.0)).engine
    fresh.load_checkpoint(folder)
    script.engine.register_state(late=other)
    script.engine.save_checkpoint(folder)
    fresh.load_checkpoint(folder)
    found.append(message_of(CheckpointError, lambda: fresh.register_state(late=random.Random())))
    return found


def test_what_cannot_be_registered_or_restored_is_said(ranks, tmp_path):
    for number, system, reserved, kind, late in ranks(1).run(misfits, str(tmp_path)):
        assert "register_state(strange=...)" in number and "int is neither" in number
        assert "SystemRandom is neither" in system
        assert "are reserved" in reserved
        assert "register_state(by_numpy=...): the checkpoint holds a numpy.random.Generator of PCG64" in kind
        assert "holds a numpy.random.Generator of MT19937, this is a random.Random" in late


def interrupted(folder: str) -> tuple[Any, Any]:
    """A checkpoint is loaded in the middle of an accumulation: whose gradients must not be in the next step."""
    outcomes = []
    for backwards in (0, 1, 3):
        script = Script(config(2, 4, clip=0.0))
        if backwards == 0:
            script.engine.save_checkpoint(folder)
        for (inputs, targets, _), _ in zip(script.loader, range(backwards), strict=False):
            script.engine.backward(script.engine(inputs, targets))
            script.engine.step()
        script.engine.load_checkpoint(folder)
        script.run(2)
        outcomes.append(script.outcome())
    return outcomes


def test_an_interrupted_accumulation_is_dropped(ranks, tmp_path):
    for outcomes in ranks(2).run(interrupted, str(tmp_path)):
        for seen, losses, whole in outcomes:
            assert (seen, losses) == outcomes[0][:2]
            assert all(torch.equal(whole[name], outcomes[0][2][name]) for name in whole)


def refusals() -> list[str]:
    from runtime.config import ConfigError
    from runtime.engine.initialize import initialize
    from tests.numerics.training import message_of

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(range(3))

        def __len__(self) -> int:
            return 3

    def start(data: Any) -> str:
        settings = config(0, 1, clip=0.0)
        return message_of(ConfigError, lambda: initialize(model=Dropping(), config=settings, training_data=data))

    return [start(Stream()), start(iter([1])), start([])]


def test_data_without_a_length_or_without_samples_is_refused(ranks):
    for stream, iterator, empty in ranks(1).run(refusals):
        assert "got Stream" in stream and "with a length" in iterator and "got an empty data set" in empty
