"""The loader of initialize(training_data=...): torch's order, from wherever training stopped, on any number of
ranks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from runtime.data.loader import Position, ResumableLoader, ResumableSampler


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Training:
    """One rank that trains what its loader gives."""

    def __init__(
        self, count: int, rank: int = 0, world: int = 1, micro: int = 2, drop_last: bool = False, **options: Any
    ) -> None:
        self.micro_steps = 0
        self.sampler = ResumableSampler(count, rank, world, micro, 5, drop_last, lambda: self.micro_steps)
        self.loader = ResumableLoader(Numbers(count), self.sampler, **options)

    def epoch(self) -> Iterator[list[int]]:
        """One iteration of a script; each batch is trained before the next is asked for."""
        for batch in self.loader:
            self.micro_steps += 1
            yield batch.tolist()

    def epochs(self, number: int) -> list[list[list[int]]]:
        return [list(self.epoch()) for _ in range(number)]


def in_order(ranks: list[Training], batches: int) -> list[int]:
    """Samples in the epoch's order, as `batches` of all ranks hold them."""
    streams = [rank.epoch() for rank in ranks]
    taken = []
    for _ in range(batches):
        taken += [sample for row in zip(*(next(stream) for stream in streams), strict=True) for sample in row]
    return taken


def world_of(size: int, count: int, micro: int, **more: Any) -> list[Training]:
    return [Training(count, rank, size, micro, **more) for rank in range(size)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("world", "count"), [(1, 9), (2, 20), (3, 20), (3, 2)])
def test_the_order_is_that_of_torchs_distributed_sampler(world: int, count: int, drop_last: bool) -> None:
    for rank in range(world):
        ours = Training(count, rank, world, micro=2, drop_last=drop_last)
        theirs = DistributedSampler(Numbers(count), world, rank, shuffle=True, seed=5)
        loader = DataLoader(Numbers(count), batch_size=2, sampler=theirs, drop_last=drop_last)
        assert len(ours.loader) == len(loader) and len(ours.sampler) == len(theirs)
        for epoch in range(3):
            theirs.set_epoch(epoch if len(loader) else 0)
            assert [batch.tolist() for batch in loader] == list(ours.epoch())


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resume_goes_on_behind_the_last_batch_at_every_place(rank: int, drop_last: bool) -> None:
    def fresh() -> Training:
        return Training(11, rank, 2, micro=2, drop_last=drop_last)

    unbroken = list(itertools.chain(*fresh().epochs(4)))
    for stop in range(1, 9):
        first, second = fresh(), fresh()
        batches = itertools.chain.from_iterable(first.epoch() for _ in range(4))
        before = list(itertools.islice(batches, stop))
        second.loader.load_state_dict(first.loader.state_dict())
        after = list(itertools.chain(*second.epochs(4)))
        assert (before + after)[: len(unbroken)] == unbroken


@pytest.mark.parametrize(("world", "micro"), [(1, 6), (2, 1), (3, 2), (4, 1)])
def test_the_order_goes_on_at_another_world_size(world: int, micro: int) -> None:
    count, order = 48, world_of(1, 48, 1)[0].sampler.order(0).tolist()
    writers, readers = world_of(2, count, 3), world_of(world, count, micro)
    taken = in_order(writers, 3)
    for reader in readers:
        reader.loader.load_state_dict(writers[0].loader.state_dict())
    left = (count - len(taken)) // (world * micro)
    rest = in_order(readers, left)
    assert taken + rest == order[: len(taken) + len(rest)] and len(taken) == 18
    assert count - len(taken) - len(rest) < world * micro


def test_an_epoch_whose_rest_does_not_divide_is_filled_up_with_its_first_samples() -> None:
    order = Training(10).sampler.order(0).tolist()
    writer, readers = Training(10, micro=3), world_of(4, 10, 1)
    next(writer.epoch())
    for reader in readers:
        reader.loader.load_state_dict(writer.loader.state_dict())
    assert in_order(readers, 2) == order[3:] + order[:1]
    assert readers[0].sampler.position == Position(1)


def test_what_was_handed_out_and_not_trained_comes_again() -> None:
    first, second = Training(10), Training(10)
    whole = first.epochs(1)[0]
    first, again = Training(10), Training(10)
    for number, _ in enumerate(first.loader):  # a script that stops when it has enough
        if number == 2:
            break
        first.micro_steps += 1
    again.loader.load_state_dict(first.loader.state_dict())
    assert list(again.epoch()) == list(first.epoch()) == whole[2:]
    for number, _ in enumerate(second.loader):  # a script that skips a batch, and trains the next
        second.micro_steps += number != 1
        if number == 2:
            break
    assert list(second.epoch()) == whole[3:]


def test_a_script_that_skips_the_last_batch_comes_to_the_next_epoch() -> None:
    training, whole = Training(7), Training(7).epochs(2)
    for _ in range(2):  # after a break nothing but the incomplete batch is left
        for batch in training.loader:
            if len(batch) < 2:
                continue
            training.micro_steps += 1
            if training.micro_steps == 3:
                break
    assert list(training.epoch()) == whole[1]


def test_batches_fetched_ahead_come_again() -> None:
    options = {"num_workers": 1, "prefetch_factor": 3, "multiprocessing_context": "forkserver"}
    whole, first = Training(20).epochs(1)[0], Training(20, **options)
    stream = first.epoch()
    assert [next(stream), next(stream)] == whole[:2]
    state = first.loader.state_dict()
    stream.close()
    second = Training(20)
    second.loader.load_state_dict(state)
    assert list(second.epoch()) == whole[2:]


def test_looking_at_batches_moves_nothing() -> None:
    training, whole = Training(10), Training(10).epochs(2)
    next(iter(training.loader))
    assert len(list(training.loader)) == 5
    stream = training.epoch()
    assert [next(stream), next(stream)] == whole[0][:2]
    assert len(list(training.loader)) == 3  # an evaluation in the training loop
    assert training.loader.state_dict()["consumed"] == 4
    assert list(stream) == whole[0][2:]
    assert list(training.epoch()) == whole[1]


def test_set_epoch_as_scripts_call_it() -> None:
    training, whole = Training(8), Training(8).epochs(8)
    for epoch in (0, 1, 5):
        training.loader.sampler.set_epoch(epoch)
        assert list(training.epoch()) == whole[epoch]
    training.loader.sampler.set_epoch(6)
    next(training.epoch())
    training.loader.sampler.set_epoch(6)  # under way already
    assert list(training.epoch()) == whole[6][1:]
    assert training.loader.epoch == 7


@pytest.mark.parametrize("first_epoch", [0, 2, 3])
def test_set_epoch_after_a_resume_names_the_epoch_under_way(first_epoch: int) -> None:
    """0: the script begins its loop anew. 3: it kept its epoch in client_state."""
    whole, writer, reader = Training(8).epochs(5), Training(8), Training(8)
    writer.epochs(3)
    next(writer.epoch())
    reader.loader.load_state_dict(writer.loader.state_dict())
    for epoch, expected in ((first_epoch, whole[3][1:]), (first_epoch + 1, whole[4])):
        reader.loader.sampler.set_epoch(epoch)
        assert list(reader.epoch()) == expected


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_checkpoint_that_is_loaded_moves_the_iteration_under_way(taken: int) -> None:
    whole, writer, reader = Training(8).epochs(2), Training(8), Training(8)
    next(writer.epoch())
    state = writer.loader.state_dict()
    stream = reader.epoch()
    for _ in range(taken):
        next(stream)
    reader.loader.load_state_dict(state)
    assert list(stream) == whole[0][1:] and list(reader.epoch()) == whole[1]


def test_other_data_begins_at_its_beginning_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    writer, reader = Training(8), Training(12)
    next(writer.epoch())
    with caplog.at_level(logging.WARNING, "runtime.data"):
        reader.loader.load_state_dict(writer.loader.state_dict())
    assert "made with samples 8, now it is 12" in caplog.text
    assert list(reader.epoch()) == Training(12).epochs(1)[0]


def test_an_iteration_takes_nothing_from_torchs_random_numbers() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Training(6).epochs(2)
    assert torch.equal(torch.get_rng_state(), before)
