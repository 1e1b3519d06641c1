"""Packing keeps every sample once, never overfills, and wastes little; batches say what is predicted from what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.data.conversations.batches import IGNORED, EvaluationBatches, Sequences, TrainingBatches
from runtime.data.conversations.packing import Plan, pack, separate
from runtime.data.conversations.store import FORMAT, Store


def lengths_like_chat(count: int, seq_len: int) -> np.ndarray:
    made = np.random.default_rng(0).lognormal(5.3, 0.9, count).astype(np.int32)
    return np.clip(made, 8, seq_len)


def test_every_sample_is_packed_once_and_no_sequence_is_too_long() -> None:
    lengths = lengths_like_chat(5000, 2048)
    counted = lengths // 3
    plan = pack(np.arange(5000), lengths, counted, 2048, seed=1)
    assert sorted(plan.samples) == list(range(5000))
    for number in range(len(plan)):
        assert plan.lengths[number] == lengths[plan.of(number)].sum() <= 2048
        assert plan.counted[number] == counted[plan.of(number)].sum()


@pytest.mark.parametrize("seq_len", [1024, 2048, 8192])
def test_sequences_are_full(seq_len: int) -> None:
    lengths = lengths_like_chat(20_000, seq_len)
    plan = pack(np.arange(len(lengths)), lengths, lengths, seq_len, seed=0)
    assert lengths.sum() / (len(plan) * seq_len) >= 0.95


def test_packing_depends_on_the_seed_and_nothing_else() -> None:
    lengths = lengths_like_chat(1000, 512)
    one, same, other = (pack(np.arange(1000), lengths, lengths, 512, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.samples, same.samples)
    assert not np.array_equal(one.samples, other.samples)


def test_samples_that_repeat_and_no_samples() -> None:
    lengths = np.array([5, 3], np.int32)
    plan = pack(np.array([0, 0, 1]), lengths, lengths, 8, seed=0)
    assert sorted(plan.samples) == [0, 0, 1]
    assert len(pack(np.empty(0, np.int64), lengths, lengths, 8, seed=0)) == 0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Samples of 4, 3, 6 and 2 tokens: ids count up from 10, every token but the first two of a sample is trained."""
    import json

    lengths = np.array([4, 3, 6, 2], np.int32)
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.uint16)
    trained = np.concatenate([np.arange(length) >= min(2, length - 1) for length in lengths]).astype(np.uint8)
    arrays = {"tokens": tokens, "trained": trained, "lengths": lengths, "numbers": np.arange(4, dtype=np.int64)}
    arrays |= {
        "files": np.zeros(4, np.int32),
        "counted": np.maximum(lengths - 2, 1).astype(np.int32),
        "cut": np.zeros(4, np.int32),
    }
    for name, array in arrays.items():
        array.tofile(tmp_path / f"{name}.bin")
    meta = {"store": FORMAT, "dtype": "uint16", "tokens": int(lengths.sum()), "samples": 4, "files": ["x"]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return Store(tmp_path)


def plan_of(store: Store, *packs: list[int]) -> Plan:
    samples = np.array([sample for members in packs for sample in members], np.int64)
    offsets = np.cumsum([0, *map(len, packs)]).astype(np.int64)
    lengths = np.array([store.lengths[members].sum() for members in packs], np.int32)
    return Plan(samples, offsets, lengths, np.array([store.counted[members].sum() for members in packs], np.int32))


def test_no_document_is_predicted_from_another(store: Store) -> None:
    sequences = Sequences(store, plan_of(store, [0, 1], [3]), padding=9, width=9)
    tokens, targets, positions = sequences.batch([0, 1])
    none = IGNORED
    assert tokens.tolist() == [[10, 11, 12, 13, 14, 15, 16, 9, 9], [23, 24, 9, 9, 9, 9, 9, 9, 9]]
    assert targets.tolist() == [[none, 12, 13, none, none, 16, none, none, none], [24, *[none] * 8]]
    assert positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]]
    assert tokens.dtype == targets.dtype == positions.dtype == torch.int64


def test_unpacked_rows_are_as_long_as_the_longest(store: Store) -> None:
    plan = separate(np.arange(4), np.asarray(store.lengths), np.asarray(store.counted))
    tokens, targets, _ = Sequences(store, plan, padding=9, width=None).batch([3, 2])
    assert tokens.shape == (2, 8)
    assert (targets != IGNORED).sum() == 5


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(1, 1, 1), (2, 3, 2), (1, 2, 4)])
def test_trained_tokens_are_those_of_the_whole_global_batch(
    store: Store, micro: int, accumulation: int, world: int
) -> None:
    sequences = Sequences(store, plan_of(store, [0, 1], [2], [3]), padding=0, width=7)
    ranks = [TrainingBatches(sequences, 5, micro, accumulation, rank, world) for rank in range(world)]
    for step in (0, 1, 4, 2):
        made = [list(rank.micro_batches(step)) for rank in ranks]
        assert all(len(batches) == accumulation for batches in made)
        counted = sum(int((batch.targets != IGNORED).sum()) for batches in made for batch in batches)
        assert {rank.trained_tokens(step) for rank in ranks} == {counted}
    for rank in ranks:
        rank.close()


def test_batches_are_a_function_of_the_step(store: Store) -> None:
    sequences = Sequences(store, plan_of(store, [0, 1], [2], [3]), padding=0, width=7)
    one, other = (TrainingBatches(sequences, 5, 2, 2, 0, 1) for _ in range(2))
    forward = {step: [batch.tokens.tolist() for batch in one.micro_batches(step)] for step in range(6)}
    for step in (4, 1, 5):
        assert [batch.tokens.tolist() for batch in other.micro_batches(step)] == forward[step]
    one.close()
    other.close()


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (2, 1), (2, 2), (1, 4), (3, 2)])
def test_an_evaluation_sees_every_sequence_once_with_equal_passes(store: Store, micro: int, world: int) -> None:
    sequences = Sequences(store, plan_of(store, [0], [1], [2], [3]), padding=0, width=None)
    ranks = [EvaluationBatches(sequences, micro, rank, world) for rank in range(world)]
    made = [list(rank) for rank in ranks]
    assert {len(batches) for batches in made} == {ranks[0].passes}
    assert all(len(batch.tokens) == micro for batches in made for batch in batches)
    seen = [
        target for batches in made for batch in batches for target in batch.targets.flatten().tolist() if target >= 0
    ]
    wanted = np.flatnonzero(store.trained) + 10
    assert sorted(seen) == wanted.tolist()
    assert len(seen) == ranks[0].trained_tokens
