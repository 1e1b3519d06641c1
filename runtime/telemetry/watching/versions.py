"""The versions of other trainers that are supported: with others a watch goes on, and the run is warned."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import NamedTuple


class Supported(NamedTuple):
    """Versions of a package: from the first one on, below the second one."""

    since: str
    below: str

    def __str__(self) -> str:
        return f">={self.since}, <{self.below}"


SUPPORTED = {
    "torch": Supported("2.11", "2.16"),
    "deepspeed": Supported("0.19", "0.20"),
    "transformers": Supported("5.2", "6"),
    "trl": Supported("1.0", "2"),
    "pytorch_lightning": Supported("2.5", "3"),
    "lightning": Supported("2.5", "3"),
    "accelerate": Supported("1.1", "2"),
}
"""Name of the module -> versions. docs/watch.md has them, too."""


def unsupported(modules: Iterable[str]) -> list[str]:
    """A sentence for each of these modules that is loaded in a version outside of its range."""
    found = []
    for name in modules:
        version, supported = str(getattr(sys.modules.get(name), "__version__", "")), SUPPORTED[name]
        numbers = _numbers(version)
        if numbers and not _numbers(supported.since) <= numbers < _numbers(supported.below):
            found.append(
                f"{name} {version} is not supported ({supported} is): phases, figures and commands may be missing or "
                "wrong. The training itself is not affected"
            )
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); empty if it does not begin with a number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
