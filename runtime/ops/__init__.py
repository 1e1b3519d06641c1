"""`deepspeed.ops`, as far as training scripts name it: the optimizers in ops/adam.py, ops/adagrad.py and
ops/lion.py."""

from __future__ import annotations

from typing import Any

from runtime.deepspeed_paths import attribute_of


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.ops", name)
