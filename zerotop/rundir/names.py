"""Names of runs: which are allowed, and one for a run without a name."""

from __future__ import annotations

import random
import re
from collections.abc import Container

from zerotop.rundir.paths import RunError

MAX_LENGTH = 40
_ALLOWED = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ADJECTIVES = (
    "amber brave brisk calm clear coral dusty early fleet frosty gentle golden hazel ivory jolly keen "  # noqa: SIM905
    "lively lucid mellow misty noble olive plain quick quiet rapid rosy silver solid steady sunny swift "
    "tidy topaz vivid warm wild young".split()
)
_NOUNS = (
    "badger beacon birch brook canyon cedar comet crane delta ember falcon fern fjord grove harbor "  # noqa: SIM905
    "heron iris island lagoon lark maple meadow otter peak pine prairie raven reef ridge river sparrow "
    "spruce summit thistle tiger valley willow wren".split()
)


def check_name(name: str) -> str:
    """`name`, if it is allowed. Raises RunError otherwise."""
    if len(name) > MAX_LENGTH or not _ALLOWED.fullmatch(name):
        raise RunError(
            f"--name {name!r}: a run's name is 1 to {MAX_LENGTH} of the characters a-z 0-9 . _ - "
            "and starts with a letter or a digit"
        )
    return name


def generate_name(taken: Container[str]) -> str:
    """Two words, such as quiet-otter, that no run has."""
    for _ in range(200):
        name = f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}"
        if name not in taken:
            return name
    number = 2
    while (numbered := f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}-{number}") in taken:
        number += 1
    return numbered
