"""tests/harness/spreading.py: no test is lost, and long ones stand first on every worker."""

from __future__ import annotations

import pytest

from tests.harness import ROOT
from tests.harness.spreading import LONG, seconds_of, spread


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_every_test_is_there_once_and_each_worker_begins_with_long_ones(workers: int) -> None:
    names = [f"tests/faults/test_{file}.py::test_{n}" for file in range(8) for n in range(5)]
    names += [f"tests/unit/test_{file}.py::test_{n}" for file in range(30) for n in range(7)]
    order = spread([(name, name) for name in names], workers)
    assert sorted(order) == sorted(names)
    stretches = []
    for left in range(workers, 0, -1):  # as worksteal divides them
        share = len(order) // left
        stretches.append(order[:share])
        order = order[share:]
    long_s = [sum(map(seconds_of, stretch)) for stretch in stretches]
    assert all(seconds_of(stretch[0]) for stretch in stretches)
    assert max(long_s) - min(long_s) <= 5 * seconds_of("tests/faults/test_0.py"), "no more than one file apart"


def test_what_takes_long_is_there_and_the_particular_stands_before_the_general() -> None:
    starts = list(LONG)
    assert all((ROOT / start).exists() for start in starts)
    for at, start in enumerate(starts):
        assert not any(start.startswith(earlier) for earlier in starts[:at])


def test_more_long_tests_than_a_worker_has_room_for() -> None:
    names = [*(f"tests/faults/test_a.py::test_{n}" for n in range(9)), "tests/unit/test_b.py::test_it"]
    assert sorted(spread([(name, name) for name in names], 3)) == sorted(names)
