"""Batch arithmetic: how two numbers give the third, and that every offered way out works."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from runtime.config import DEFAULT_MICRO_BATCH, ConfigError, load

TRAIN, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def solved(ranks: int, **keys: Any) -> tuple[int, int, int]:
    resolved = load(keys).resolve(ranks, "cpu")
    return resolved.micro_batch, resolved.accumulation, resolved.global_batch


@pytest.mark.parametrize(
    ("keys", "ranks", "expected"),
    [
        ({TRAIN: 64, MICRO: 4, ACCUMULATION: 4}, 4, (4, 4, 64)),
        ({TRAIN: 64, MICRO: 4}, 4, (4, 4, 64)),
        ({TRAIN: 64, ACCUMULATION: 4}, 4, (4, 4, 64)),
        ({MICRO: 4, ACCUMULATION: 4}, 4, (4, 4, 64)),
        ({TRAIN: 64}, 4, (16, 1, 64)),
        ({MICRO: 3}, 5, (3, 1, 15)),
        ({TRAIN: 64, MICRO: "auto", ACCUMULATION: 4}, 2, (8, 4, 64)),
        ({TRAIN: "auto", MICRO: "auto", ACCUMULATION: 8}, 2, (DEFAULT_MICRO_BATCH, 8, DEFAULT_MICRO_BATCH * 16)),
        ({}, 2, (DEFAULT_MICRO_BATCH, 1, DEFAULT_MICRO_BATCH * 2)),
    ],
)
def test_the_third_number(keys: dict[str, Any], ranks: int, expected: tuple[int, int, int]) -> None:
    assert solved(ranks, **keys) == expected


def test_accumulation_alone_is_not_enough() -> None:
    with pytest.raises(ConfigError, match=f"{ACCUMULATION}: alone .* add {MICRO} or {TRAIN}"):
        solved(1, **{ACCUMULATION: 4})


def test_chosen_micro_batch_is_said() -> None:
    notes = load({}).resolve(1, "cpu").notes
    assert f"{MICRO}: {DEFAULT_MICRO_BATCH}, our default" in notes


def ways_out(message: str) -> list[tuple[str, int]]:
    """(key or "ranks", number) of each offered way."""
    offered = message.partition("Any one of these works: ")[2]
    found = [(key, int(number)) for key, number in re.findall(r"(\w+_\w+) (\d+)", offered)]
    return found + [("ranks", int(number)) for number in re.findall(r"(\d+) ranks?", offered)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_every_way_out_works(ranks: int) -> None:
    failures = 0
    sizes = (None, 1, 2, 3, 5, 8)
    for total, micro, accumulation in itertools.product((1, 7, 12, 24, 64), sizes, sizes):
        keys = {TRAIN: total, MICRO: micro, ACCUMULATION: accumulation}
        keys = {key: value for key, value in keys.items() if value is not None}
        try:
            micro_batch, steps, batch = solved(ranks, **keys)
        except ConfigError as error:
            failures += 1
            ways = ways_out(str(error))
            assert ways, str(error)
            for key, number in ways:
                changed = keys if key == "ranks" else keys | {key: number}
                solved(number if key == "ranks" else ranks, **changed)
        else:
            assert micro_batch * steps * ranks == batch == total
            assert micro in (None, micro_batch)
            assert accumulation in (None, steps)
    assert failures > 0


def test_indivisible_batch_says_what_it_is_divided_by() -> None:
    with pytest.raises(ConfigError) as caught:
        solved(3, **{TRAIN: 24, MICRO: 3})
    assert "24 does not divide by train_micro_batch_size_per_gpu 3 x 3 ranks = 9" in str(caught.value)


@pytest.mark.parametrize("key", [TRAIN, MICRO, ACCUMULATION])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, [4]])
def test_sizes_are_whole_numbers_from_one(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected"):
        load({key: value})


def test_huge_sizes_do_not_hang() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        solved(7, **{TRAIN: 10**18 + 1, MICRO: 10**9})
