"""The engine: DeepSpeed's API around a model and its training state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.deepspeed_paths import attribute_of

if TYPE_CHECKING:
    from runtime.engine.engine import DeepSpeedEngine, Engine

__all__ = ["DeepSpeedEngine", "Engine"]

_LATER = {"DeepSpeedEngine": "engine", "Engine": "engine"}


def __getattr__(name: str) -> Any:
    return attribute_of("runtime.engine", name, _LATER)
