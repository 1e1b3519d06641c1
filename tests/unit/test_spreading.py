"""tests/harness/spreading.py: no test is lost, and long ones stand first on every worker."""

from __future__ import annotations

import pytest

from tests.harness.spreading import LONG, spread


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_every_test_is_there_once_and_each_worker_begins_with_long_ones(workers: int) -> None:
    names = [f"tests/faults/test_{file}.py::test_{n}" for file in range(8) for n in range(5)]
    names += [f"tests/unit/test_{file}.py::test_{n}" for file in range(30) for n in range(7)]
    order = spread([(name, name) for name in names], workers)
    assert sorted(order) == sorted(names)
    share = -(-len(names) // workers)
    stretches = [order[at : at + share] for at in range(0, len(order), share)]
    assert len(stretches) == workers and all(stretch[0].startswith(LONG) for stretch in stretches)


def test_more_long_tests_than_a_worker_has_room_for() -> None:
    names = [*(f"tests/faults/test_a.py::test_{n}" for n in range(9)), "tests/unit/test_b.py::test_it"]
    assert sorted(spread([(name, name) for name in names], 3)) == sorted(names)
