"""The order of the tests on several workers: what takes long comes first on each of them, and is spread evenly.

pytest-xdist's worksteal gives each worker one stretch of the list, and a worker that is done takes from the end of
another's. Left in alphabetical order, one worker would get most of the long tests, and the others would wait for it in
the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

LONG = {
    "tests/integrations/": 25.0,
    "tests/finetuning/test_tutorial.py": 70.0,
    "tests/faults/test_branch.py": 25.0,
    "tests/faults/test_clear_ends.py": 20.0,
    "tests/faults/test_evidence.py": 20.0,
    "tests/faults/test_hang.py": 15.0,
    "tests/faults/test_memory_truth.py": 20.0,
    "tests/faults/test_profile.py": 35.0,
    "tests/faults/test_real_run.py": 60.0,
    "tests/faults/": 6.0,
    "tests/memory/test_finetuning_ledger.py": 6.0,
    "tests/numerics/test_deepspeed_script.py": 10.0,
    "tests/numerics/test_finetuned_export.py": 6.0,
    "tests/numerics/test_read_anywhere.py": 5.0,
    "tests/numerics/test_saving_beside.py": 6.0,
    "tests/numerics/test_scripts.py": 7.0,
    "tests/unit/native/test_cuda_on_host.py": 6.0,
    "tests/unit/native/test_cuda_registers.py": 19.0,
    "tests/unit/native/test_sanitized.py": 18.0,
    "tests/ssh/": 5.0,
}
"""How the ids of the long tests begin -> seconds that one takes, roughly; the first that fits counts. Those of real
runs, of processes that each import torch, and of compilers."""

Item = TypeVar("Item")


def seconds_of(name: str) -> float:
    """What a test of this id takes, roughly; 0 for one that is not long."""
    return next((seconds for start, seconds in LONG.items() if name.startswith(start)), 0.0)


def spread(items: Sequence[tuple[str, Item]], workers: int) -> list[Item]:
    """The items, in as many stretches as there are workers, with long tests at the start of each and about the same
    time in all of them. items: with their ids, "FILE::NAME". The tests of a file stay together where there is room."""
    files = [[*those] for _, those in groupby(items, key=lambda item: item[0].split("::")[0])]
    rest = [item for those in files for name, item in those if not seconds_of(name)]
    hands: list[list[Item]] = [[] for _ in range(workers)]
    taken_s = [0.0] * workers
    for those in sorted((file for file in files if seconds_of(file[0][0])), key=_seconds, reverse=True):
        hand = taken_s.index(min(taken_s))
        hands[hand].extend(item for _, item in those)
        taken_s[hand] += _seconds(those)
    order: list[Item] = []
    for hand, left in zip(hands, range(workers, 0, -1), strict=True):
        share = (len(items) - len(order)) // left  # as worksteal divides what is left
        room = max(0, share - len(hand))
        order += hand + rest[:room]
        del rest[:room]
    return order + rest


def _seconds(file: Sequence[tuple[str, Item]]) -> float:
    return sum(seconds_of(name) for name, _ in file)
