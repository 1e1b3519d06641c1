"""The ZeRO engine's parts, each knowing only those before it.

layout     which element of which parameter lies where, and who owns it (torch-free)
stage      what a ZeRO stage is: a policy of a few answers
cut        a model's units
weights, init, values   where initial values come from; zero.Init
home       which memory states live in; downlink: how gradients get there
pool, gradients, flat   one flat buffer: parameters, masters, gradients
unit       the flats that are gathered, reduced and updated together
hooks      what modules hold for an engine
schedule   when gradients are reduced; gathering: when parameters are there; clip: what ranks agree on at a boundary
whole      the whole model for those who ask; GatheredParameters
(who updates when: runtime/optim/updates.py)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.zero.init import Init
    from runtime.zero.whole import GatheredParameters

__all__ = ["GatheredParameters", "Init"]

_MODULES = {"Init": "runtime.zero.init", "GatheredParameters": "runtime.zero.whole"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'runtime.zero' has no attribute {name!r}; it has {', '.join(__all__)}")
