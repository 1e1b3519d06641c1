"""A plugin of pytest's: which of a file's tests run, by the environment that the benchmark sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = [item for item in items if os.environ["ZEROTOP_ONLY"] in item.name]
    sample, done = int(os.environ["ZEROTOP_SAMPLE"]), int(os.environ["ZEROTOP_DONE"])
    if 0 < sample < len(chosen):
        chosen = [chosen[at * len(chosen) // sample] for at in range(sample)]
    items[:] = chosen[done:]
    Path(os.environ["ZEROTOP_NAMES"]).write_text("\n".join(item.name for item in items))
