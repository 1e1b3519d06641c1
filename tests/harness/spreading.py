"""The order of the tests on several workers: what starts whole runs comes first on each of them, and is spread evenly.

pytest-xdist's worksteal gives each worker one stretch of the list, and who is done takes from the end of another's.
Left in alphabetical order, one worker would get most of the long tests, and the others would wait for it in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

LONG = (
    "tests/faults/",
    "tests/finetuning/",
    "tests/integrations/",
    "tests/ssh/",
    "tests/numerics/test_saving_beside.py",
)
"""How the ids of the long tests begin: those of real runs, and of processes that each import torch."""

Item = TypeVar("Item")


def spread(items: Sequence[tuple[str, Item]], workers: int) -> list[Item]:
    """The items, in as many stretches of the same length as there are workers, with long tests at the start of each.
    items: with their ids, "FILE::NAME". The tests of a file stay together where that is possible."""
    files = [(name, [*those]) for name, those in groupby(items, key=lambda item: item[0].split("::")[0])]
    hands: list[list[Item]] = [[] for _ in range(workers)]
    rest: list[Item] = []
    for name, those in files:
        hand = min(hands, key=len) if name.startswith(LONG) else rest
        hand.extend(item for _, item in those)
    share = -(-len(items) // workers)
    for hand in hands:
        room = max(0, share - len(hand))
        hand.extend(rest[:room])
        del rest[:room]
    return [item for hand in hands for item in hand] + rest
