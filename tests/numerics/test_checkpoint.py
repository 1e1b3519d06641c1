"""A checkpoint continues bit for bit at the same world size and stage, and is read at any other."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.training import (
    advance,
    assert_equal,
    config,
    engine_for,
    micro_batch,
    parameters,
    train_plainly,
    train_with_engine,
)

HALF = 4


def save_halfway(folder: str, settings, kind="plain") -> dict[str, torch.Tensor]:
    """Train HALF steps, save, train on to 2 HALF without a break; returns the end's parameters."""
    engine = engine_for(settings, kind)
    advance(engine, 0, HALF)
    engine.save_checkpoint(folder, client_state={"note": "half-way"})
    advance(engine, HALF, 2 * HALF)
    return parameters(engine)


def continue_from(folder: str, settings, kind="plain"):
    engine = engine_for(settings, kind)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None and client_state == {"note": "half-way"} and engine.global_steps == HALF
    random_number = torch.rand(1).item()
    advance(engine, HALF, 2 * HALF)
    return parameters(engine), random_number


SCHEDULED = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_continues_bit_for_bit(ranks, tmp_path, stage, precision):
    settings = config(stage, 2, clip=0.5, precision=precision, **SCHEDULED)
    whole = ranks(2).run(save_halfway, str(tmp_path), settings)
    resumed = ranks(2).run(continue_from, str(tmp_path), settings)
    for unbroken, (ours, _) in zip(whole, resumed, strict=True):
        assert all(torch.equal(unbroken[name], ours[name]) for name in unbroken)


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (3, 2), (4, 1), (3, 3), (1, 3)])
def test_is_read_at_another_world_size_and_stage(ranks, tmp_path, world, stage):
    # Six samples a step at any of these worlds would not split alike; only what was loaded is compared.
    ranks(2).run(save_halfway, str(tmp_path), config(2 if stage == 3 else 3, 2, clip=0.5))
    loaded = ranks(world).run(load_only, str(tmp_path), config(stage, 1, clip=0.5))
    reference = train_plainly("plain", 2, 2, clip=0.5, steps=HALF)
    for ours in loaded:
        assert_equal(ours, reference)


def load_only(folder: str, settings) -> dict[str, torch.Tensor]:
    engine = engine_for(settings)
    engine.load_checkpoint(folder)
    return parameters(engine)


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop"])
def test_other_optimizers_continue(ranks, tmp_path, optimizer):
    settings = config(1, 1, clip=0.0, optimizer=optimizer)
    settings["optimizer"]["params"] |= {"momentum": 0.9}
    whole = ranks(2).run(save_halfway, str(tmp_path), settings)
    resumed = ranks(2).run(continue_from, str(tmp_path), settings)
    for unbroken, (ours, _) in zip(whole, resumed, strict=True):
        assert all(torch.equal(unbroken[name], ours[name]) for name in unbroken)


def test_the_first_difference_to_the_model_is_named(ranks, tmp_path):
    ranks(2).run(save_halfway, str(tmp_path), config(1, 1, clip=0.0))
    for message in ranks(2).run(load_message, str(tmp_path), "flatland"):
        assert "embedding.weight has shape [37, 13] in the checkpoint and has shape [37, 7] in the model" in message


def load_message(folder: str, kind: str) -> str:
    from runtime.checkpoint import CheckpointError

    engine = engine_for(config(1, 1, clip=0.0), kind)
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_an_unwritable_folder_is_every_ranks_error_and_leaves_nothing(ranks, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for message in ranks(2).run(save_message, str(blocked)):
        assert message.startswith("could not create") and "file" in message
    assert list(tmp_path.iterdir()) == [blocked]


def save_message(folder: str) -> str:
    from runtime.checkpoint import CheckpointError

    engine = engine_for(config(2, 1, clip=0.0))
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def test_only_complete_checkpoints_count_and_old_ones_are_pruned(ranks, tmp_path):
    from runtime import checkpoint

    ranks(1).run(save_several, str(tmp_path), [3, 1, 2])
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / "step-00000008").mkdir()  # no manifest
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000002", "the one that was completed last"
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert [path.name for path in checkpoint.prune(tmp_path, keep=2)] == ["step-00000003"]
    assert checkpoint.newest(tmp_path) == newest


def save_several(folder: str, steps: list[int]) -> None:
    from runtime.checkpoint import step_tag

    engine = engine_for(config(0, 1, clip=0.0))
    for step in steps:
        engine.global_steps = step
        engine.save_checkpoint(folder, step_tag(step))


def test_the_loss_is_reported_and_no_sync_accumulates(ranks):
    for stage in (0, 2, 3):
        synced = ranks(2).run(train_with_engine, "plain", config(stage, 2, clip=0.0), 3)
        unsynced = ranks(2).run(train_without_sync, config(stage, 1, clip=0.0))
        for (ours, _, _), other in zip(synced, unsynced, strict=True):
            assert_equal(ours, other, tolerance=1e-6)


def train_without_sync(settings) -> dict[str, torch.Tensor]:
    """Accumulate two micro-batches by hand: halved losses, the first under no_sync."""
    import torch.distributed as dist

    engine = engine_for(settings)
    for step in range(3):
        with engine.no_sync():
            engine.backward(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size())) / 2)
        engine.backward(engine(*micro_batch(step, 1, dist.get_rank(), dist.get_world_size())) / 2)
        engine.step()
    return parameters(engine)
