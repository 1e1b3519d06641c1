"""Checkpoints that are written beside training hold the moment at which they were begun, whatever training does
meanwhile; and what goes wrong with a writer process is every rank's error and no end."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime.checkpoint import checkpointer
from runtime.checkpoint.content.capture import blocks_of
from tests.harness.waiting import patient
from tests.numerics.test_offload import offloaded
from tests.numerics.training import advance, config, engine_for, parameters

STEPS = 3


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(path)
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in known.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def save_both_ways(folder: str, settings: dict[str, Any], kind: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """One checkpoint while training waits, and one beside it, of the same step; training goes on at once."""
    engine = engine_for(settings, kind)
    advance(engine, 0, STEPS)
    engine.save_checkpoint(folder, "waited")
    engine.save_checkpoint(folder, "beside", wait=False)
    advance(engine, STEPS, 2 * STEPS)
    engine.wait_for_checkpoint()
    return parameters(engine), sorted(path.name for path in Path(folder).iterdir())


CASES = [
    (1, config(0, 1, clip=0.0), "plain"),
    pytest.param(2, config(1, 1, clip=0.0, optimizer="RMSprop"), "frozen", marks=pytest.mark.slow),
    (2, config(2, 2, clip=0.5, precision="bf16"), "tied"),
    pytest.param(2, config(3, 1, clip=0.0), "plain", marks=pytest.mark.slow),
    pytest.param(1, offloaded(config(0, 1, clip=0.0)), "plain", marks=pytest.mark.slow),
    pytest.param(2, offloaded(config(2, 1, clip=0.5, precision="bf16")), "plain", marks=pytest.mark.slow),
    (2, offloaded(config(3, 2, clip=0.0)), "frozen"),
]


@pytest.mark.parametrize(("world", "settings", "kind"), CASES)
def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(ranks, reference, tmp_path, world, settings, kind):
    saved = ranks(world).run(save_both_ways, str(tmp_path), settings, kind)
    whole = reference(world, train_through, settings, kind)
    for (ours, names), unbroken in zip(saved, whole, strict=True):
        assert names == ["beside", "latest", "waited"]
        assert all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    waited, beside = contents(tmp_path / "waited"), contents(tmp_path / "beside")
    assert waited.keys() == beside.keys() and any(name.startswith("state.") for name in waited)
    for name in waited:
        assert torch.equal(waited[name], beside[name]), name
    assert (tmp_path / "latest").read_text() == "beside\n"


def train_through(settings: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    engine = engine_for(settings, kind)
    advance(engine, 0, 2 * STEPS)
    return parameters(engine)


def save_without_room(folder: str, settings: dict[str, Any], kind: str) -> tuple[bool, dict[str, torch.Tensor]]:
    from runtime.checkpoint.checkpointer import Checkpointer

    engine = engine_for(settings, kind)
    advance(engine, 0, STEPS)
    engine.save_checkpoint(folder, "waited")
    with patch.object(Checkpointer, "_has_room", lambda *_: False):
        engine.save_checkpoint(folder, "beside", wait=False)
    held = sum(block.nbytes for block in blocks_of(engine.state))
    taken = engine.guard._snapshot.copied_bytes
    advance(engine, STEPS, 2 * STEPS)
    engine.wait_for_checkpoint()
    return taken < held / 10, parameters(engine)


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "AdamW"), (2, "RMSprop"), (3, "AdamW")])
def test_without_room_for_a_copy_the_next_update_waits_for_the_writer(ranks, reference, tmp_path, stage, optimizer):
    settings = config(stage, 1, clip=0.0, optimizer=optimizer)
    saved = ranks(2).run(save_without_room, str(tmp_path), settings, "plain")
    whole = reference(2, train_through, settings, "plain")
    for (small, ours), unbroken in zip(saved, whole, strict=True):
        assert small and all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    waited, beside = contents(tmp_path / "waited"), contents(tmp_path / "beside")
    assert waited.keys() == beside.keys()
    assert all(torch.equal(waited[name], beside[name]) for name in waited)


class Wide(nn.Module):
    """One parameter that fills more than one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3000, 3000, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x).square().mean()


def save_wide(folder: str) -> int:
    from runtime.engine.initialize import initialize
    from runtime.plan.constants import SNAPSHOT_SLOT_BYTES

    torch.manual_seed(0)
    engine = initialize(model=Wide(), config=offloaded(config(2, 1, clip=0.0)))[0]
    for step in range(4):
        if step == 2:
            engine.save_checkpoint(folder, "waited")
            engine.save_checkpoint(folder, "beside", wait=False)
        engine.backward(engine(torch.ones(1, 3000)))
        engine.step()
    engine.wait_for_checkpoint()
    return SNAPSHOT_SLOT_BYTES


def test_large_states_go_through_the_slots_in_pieces(ranks, tmp_path):
    (slot_bytes,) = set(ranks(1).run(save_wide, str(tmp_path)))
    waited, beside = contents(tmp_path / "waited"), contents(tmp_path / "beside")
    assert max(tensor.nbytes for tensor in waited.values()) > slot_bytes
    assert all(torch.equal(waited[name], beside[name]) for name in waited)


def save_between_hosts(folder: str) -> list[str]:
    """As if each rank were on a host of its own: the writers meet over TCP."""
    engine = engine_for(config(2, 1, clip=0.0))
    with (
        patch.object(checkpointer, "host_id", lambda: (str(dist.get_rank()),)),
        patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1"}),
    ):
        engine.save_checkpoint(folder, "far", wait=False)
        engine.wait_for_checkpoint()
    engine.checkpointer.close()
    return sorted(path.name for path in Path(folder).iterdir())


def test_writers_on_several_hosts_meet(ranks, tmp_path):
    assert ranks(2).run(save_between_hosts, str(tmp_path)) == [["far", "latest"]] * 2
    assert contents(tmp_path / "far")


def lose_a_writer(folder: str, number: int) -> list[str]:
    """Rank 1's writer is killed, or stopped, before it has written; then a save goes well, with new writers."""
    from runtime.checkpoint import CheckpointError
    from runtime.checkpoint.saving import writer_handle as writer_process
    from runtime.checkpoint.saving.protocol import ALIVE_S

    engine = engine_for(config(2, 1, clip=0.0))
    advance(engine, 0, 1)
    seen = []
    # Not for the third save: a busy machine lets its writer wait for longer than that.
    with patch.object(writer_process, "PATIENCE_S", patient(2 * ALIVE_S)):
        engine.save_checkpoint(folder, "first", wait=False)
        engine.wait_for_checkpoint()
        engine.save_checkpoint(folder, "second", wait=False)
        if dist.get_rank() == 1:
            os.kill(engine.checkpointer._writer.pid, number)
        try:
            if number == signal.SIGSTOP:
                engine.wait_for_checkpoint()
            else:
                engine.save_checkpoint(folder, "second", wait=False)  # hears of the one before, and begins nothing
                engine.wait_for_checkpoint()
        except CheckpointError as error:
            seen.append(str(error))
    seen += sorted(path.name for path in Path(folder).iterdir())
    advance(engine, 1, 2)
    engine.save_checkpoint(folder, "third", wait=False)
    engine.wait_for_checkpoint()
    engine.checkpointer.close()
    return seen


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_writer_loses_one_checkpoint_and_nothing_else(ranks, tmp_path, number):
    for seen in ranks(2).run(lose_a_writer, str(tmp_path), number):
        if seen[0] == "first":  # it was faster than the signal
            assert seen == ["first", "latest", "second"]
            continue
        words = "did not respond for" if number == signal.SIGSTOP else "the writer process exited"
        assert words in seen[0] and [name for name in seen[1:] if not name.startswith(".")] == ["first", "latest"]
    assert sorted(contents(tmp_path / "third")) == sorted(contents(tmp_path / "first"))
    assert (tmp_path / "latest").read_text() == "third\n"
    assert not list(tmp_path.glob(".*"))


def refuse_at_first(folder: str) -> tuple[str, int, list[str]]:
    from runtime.checkpoint import CheckpointError, checkpointer

    engine = engine_for(config(2, 1, clip=0.0))
    advance(engine, 0, 1)
    real = checkpointer.folders.disk_space_problem
    checkpointer.folders.disk_space_problem = lambda *given: f"it needs {given[1]} bytes"
    try:
        engine.save_checkpoint(folder, wait=False)
        problem = ""
    except CheckpointError as error:
        problem = str(error)
    finally:
        checkpointer.folders.disk_space_problem = real
    advance(engine, 1, 2)
    engine.save_checkpoint(folder, wait=False)
    engine.wait_for_checkpoint()
    return problem, engine.global_steps, sorted(path.name for path in Path(folder).iterdir())


def test_a_full_disk_is_said_before_anything_is_written(ranks, tmp_path):
    for problem, steps, names in ranks(2).run(refuse_at_first, str(tmp_path)):
        assert "global_step1: rank 0: it needs" in problem
        assert (steps, names) == (2, ["global_step2", "latest"])


def unsavable(folder: str) -> str:
    from runtime.checkpoint import CheckpointError

    engine = engine_for(config(1, 1, clip=0.0))
    advance(engine, 0, 1)
    try:
        engine.save_checkpoint(folder, client_state={"it": object()}, wait=False)
        engine.wait_for_checkpoint()
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_cannot_be_read_back_is_every_ranks_error(ranks, tmp_path):
    for message in ranks(2).run(unsavable, str(tmp_path)):
        assert "client_state holds a value that could not be loaded again" in message
    assert not [path for path in tmp_path.iterdir() if path.name != "latest"]


def resume_over_damage(folder: str, damaged: list[str]) -> tuple[list[str], str | None, int]:
    """What each damaged checkpoint's own error is, and what a resume takes."""
    from runtime.checkpoint import CheckpointError

    engine = engine_for(config(2, 1, clip=0.0))
    errors = []
    for tag in damaged:
        try:
            engine.load_checkpoint(folder, tag)
            errors.append("")
        except CheckpointError as error:
            errors.append(str(error))
    engine.autosave.folder, engine.session.resume = Path(folder), True
    path = engine.resume()
    by_script, _ = engine.load_checkpoint(folder)  # without a tag: the same
    assert by_script == str(path)
    return errors, path.name if path else None, engine.global_steps


def save_steps(folder: str, steps: int) -> None:
    engine = engine_for(config(2, 1, clip=0.0))
    for step in range(steps):
        advance(engine, step, step + 1)
        engine.save_checkpoint(folder)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_damaged_checkpoints_are_refused_and_the_one_before_is_taken(ranks, tmp_path):
    ranks(2).run(save_steps, str(tmp_path), 6)
    flip(tmp_path / "global_step6" / "__1_0.distcp")
    file = tmp_path / "global_step5" / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)
    (tmp_path / "global_step4" / "rng-1.pt").unlink()
    flip(tmp_path / "global_step3" / "manifest.json")
    flip(tmp_path / "global_step2" / "common.pt")
    tags = [f"global_step{step}" for step in (6, 5, 4, 3, 2)]
    words = ["__1_0.distcp was changed", "__0_0.distcp has", "rng-1.pt is missing", "manifest.json",
             "common.pt was changed"]  # fmt: skip
    for errors, taken, step in ranks(2).run(resume_over_damage, str(tmp_path), tags):
        for error, expected in zip(errors, words, strict=True):
            assert expected in error
        assert (taken, step) == ("global_step1", 1)


def by_the_clock(folder: str) -> tuple[list[str], list[str]]:
    """With an interval in minutes that is over at every step, and one that never is. No save is deferred, however slow
    the machine."""
    from runtime.engine import autosave

    engine = engine_for(config(2, 1, clip=0.0))
    engine.autosave.folder = Path(folder)
    seen = []
    for minutes in (1e5, 1e-7):
        engine.control.knobs.update(checkpoint_interval=0, checkpoint_minutes=minutes, checkpoints_kept=2)
        with patch.object(autosave, "WAIT_S", 60.0):
            advance(engine, engine.global_steps, engine.global_steps + 3)
        engine.checkpointer.wait_for_save()
        seen.append(sorted(path.name for path in Path(folder).glob("step-*")))
    return seen[0], seen[1]


def test_an_interval_in_minutes(ranks, tmp_path):
    for never, always in ranks(2).run(by_the_clock, str(tmp_path)):
        assert never == [] and always == ["step-00000005", "step-00000006"]


def defer(folder: str) -> tuple[list[str], int, list[str]]:
    """The disk does not keep up: rank 0's writer is stopped for a while."""
    from runtime.engine import autosave

    engine = engine_for(config(2, 1, clip=0.0))
    engine.autosave.folder = Path(folder)
    engine.control.knobs.update(checkpoint_interval=2, checkpoints_kept=5)
    heard: list[str] = []
    engine.session.link.event = lambda what, text, **more: heard.append(text)
    advance(engine, 0, 2)
    engine.checkpointer.wait_for_save()
    writer = engine.checkpointer._writer
    if dist.get_rank() == 0:
        os.kill(writer.pid, signal.SIGSTOP)
    with patch.object(autosave, "WAIT_S", 0.05):
        advance(engine, 2, 7)  # begun at step 4; due at step 6, when it is not done
    reached = engine.global_steps
    if dist.get_rank() == 0:
        os.kill(writer.pid, signal.SIGCONT)
    engine.checkpointer.wait_for_save()
    advance(engine, 7, 9)  # the deferred one comes first
    engine.checkpointer.wait_for_save()
    return heard, reached, sorted(path.name for path in Path(folder).glob("step-*"))


def test_a_slow_disk_defers_checkpoints_and_training_goes_on(ranks, tmp_path):
    (heard, reached, names), _ = ranks(2).run(defer, str(tmp_path))
    assert reached == 7
    assert sum("the checkpoint of step 6 is deferred" in text for text in heard) == 1
    assert names == ["step-00000002", "step-00000004", "step-00000008"]


def with_strided_buffer(folder: str) -> torch.Tensor:
    engine = engine_for(config(2, 1, clip=0.0))
    engine.module.register_buffer("every_other", torch.arange(12.0).view(6, 2)[:, 1])
    advance(engine, 0, 1)
    engine.save_checkpoint(folder, "beside", wait=False)
    engine.wait_for_checkpoint()
    return engine.module.every_other.clone()


def test_a_buffer_with_a_stride(ranks, tmp_path):
    kept, _ = ranks(2).run(with_strided_buffer, str(tmp_path))
    assert torch.equal(contents(tmp_path / "beside")["buffer.every_other"], kept)


def fail_before_automatic_ones(folder: str) -> list[list[str]]:
    engine = engine_for(config(2, 1, clip=0.0))
    advance(engine, 0, 1)
    return [_fail_before_an_automatic_one(engine, Path(folder, later), later) for later in LATER]


def _fail_before_an_automatic_one(engine: Any, folder: Path, later: str) -> list[str]:
    """A script's save fails, then the run's own begins."""
    from runtime.checkpoint import CheckpointError

    folder.mkdir(exist_ok=True)
    Path(folder, "taken").write_text("")
    told: list[str] = []
    engine.checkpointer.begin(Path(folder, "taken", "deeper"), "theirs", {})
    engine.checkpointer.begin(folder, "ours", {}, on_done=lambda outcome: told.append(outcome.problem))
    told.append(engine.checkpointer.wait_for_save())  # that one's own
    try:
        if later == "wait_for_checkpoint":
            engine.wait_for_checkpoint()
        else:
            engine.save_checkpoint(str(folder), "again", wait=later == "save and wait")
    except CheckpointError as error:
        told.append(str(error))
    engine.wait_for_checkpoint()  # once is enough
    return told


LATER = ["wait_for_checkpoint", "save", "save and wait"]


def test_a_scripts_failed_save_is_told_though_another_followed(ranks, tmp_path):
    for outcomes in ranks(2).run(fail_before_automatic_ones, str(tmp_path)):
        for ours, settled, theirs in outcomes:
            assert ours == settled == "" and "taken/deeper/.theirs.partial: Not a directory" in theirs
    newest = [(tmp_path / later / "latest").read_text() for later in LATER]
    assert newest == ["ours\n", "ours\n", "again\n"]
