"""`pause --release`: everything leaves the device and comes back to the same places; training goes on with the same
bits. The host's memory plays the device's."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from runtime.comm.group import SHARED_MEMORY_VARIABLE
from runtime.engine.initialize import initialize
from runtime.wire.messages import Command
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch


def started(settings: dict[str, Any], kind: str = "plain") -> Any:
    os.environ[SHARED_MEMORY_VARIABLE] = "0"  # shared memory can't be given back, a GPU's can
    try:
        return initialize(model=make(kind), config=settings)[0]
    finally:
        del os.environ[SHARED_MEMORY_VARIABLE]


def train(kind: str, settings: dict[str, Any], park: bool) -> list[float]:
    engine = started(settings, kind)
    losses = []
    for step in range(6):
        out = engine(*micro_batch(step, 0, dist.get_rank(), 2))
        loss = out["loss"] if kind == "normed" else out
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if park and step in (2, 4):
            before = engine.state.ledger.totals()
            storages = list(engine.memory._storages())
            freed = engine.memory.release()
            assert engine.memory.released and freed >= sum(before.values()) - before["communication"] > 0
            assert all(storage.nbytes() == 0 for storage in storages)
            assert not any(engine.state.ledger.totals().values()) and sum(engine.state.ledger.offloaded().values()) > 0
            engine.memory.restore()
            after = engine.state.ledger.totals()
            assert {**after, "communication": 0} == {**before, "communication": 0}
    return losses


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits_after_the_memory_was_given_back(ranks, stage, optimizer):
    for kind, precision in (("normed", "fp32"), ("plain", "bf16")):
        settings = config(stage, 1, clip=0.5, precision=precision, optimizer=optimizer)
        assert ranks(2).run(train, kind, settings, True) == ranks(2).run(train, kind, settings, False)


def release_beside_an_array() -> bool:
    engine = started(config(0, 1, clip=0.5))
    weight = engine.module.head.weight
    array = weight.detach().numpy()
    copied = array.copy()
    freed = engine.memory.release()
    kept = bool((array == copied).all())
    engine.memory.restore()
    return freed > 0 and kept and bool((weight.detach().numpy() == copied).all())


def test_memory_that_a_numpy_array_shares_stays(ranks):
    assert ranks(2).run(release_beside_an_array) == [True, True]


def no_room_at_first() -> list[Any]:
    """Another program has the memory when the run shall go on; later it has not."""
    engine = started(config(2, 1, clip=0.5))
    answers: list[Any] = []
    control = engine.control
    control._answer = lambda command, state, reason="", result=None: answers.append((state, reason))
    engine.memory.release()
    restore, full = engine.memory.restore, [True]

    def fails_on_rank_1() -> None:
        if full[0] and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 2 GiB\nand so on")
        restore()

    control._memory = SimpleNamespace(released=True, restore=fails_on_rank_1, release=engine.memory.release)
    resume = Command(id="a", name="resume", arguments={}, who="", wall_s=0.0)
    assert not control._resume(resume)
    full[0] = False
    assert control._resume(resume)
    return answers


def test_a_resume_without_room_is_rejected_on_all_ranks(ranks):
    for (first, reason), (second, _) in ranks(2).run(no_room_at_first):
        assert (first, second) == ("rejected", "applied")
        assert "memory that was released: rank 1: CUDA out of memory" in reason and "and so on" not in reason


def lose_the_supervisor_while_released(folder: str, room: bool) -> tuple[str, str, int]:
    from runtime.engine.control import RunStopped

    engine = started(config(2, 1, clip=0.5))
    control, said = engine.control, []
    engine.autosave.folder = Path(folder)
    engine.session.link.goodbye = lambda outcome, step, error: said.append((outcome, error))
    engine.memory.release()
    if not room:
        engine.memory.restore = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory"))
    engine.session.link.inbox.mark_orphaned()
    with pytest.raises(RunStopped):
        control._next_while_paused()
    return *said[0], len(list(Path(folder).glob("step-*")))


@pytest.mark.parametrize("room", [True, False])
def test_without_its_supervisor_a_released_run_saves_what_it_brings_back(ranks, tmp_path, room):
    for outcome, error, checkpoints in ranks(2).run(lose_the_supervisor_while_released, str(tmp_path), room):
        assert (outcome, checkpoints) == ("stopped", int(room))
        assert error == "" if room else "memory that was released: rank 0: CUDA out of memory" in error
