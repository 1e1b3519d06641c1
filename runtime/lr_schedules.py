"""DeepSpeed's module of learning-rate schedules: the classes (`from runtime.lr_schedules import WarmupLR`), and
constants with the names of types and parameters (WARMUP_LR, WARMUP_MAX_LR, ...)."""

import inspect

from runtime.optim.lr import (
    SCHEDULES,
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

VALID_LR_SCHEDULES = list(SCHEDULES)

__all__ = ["VALID_LR_SCHEDULES", "LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"]

_NAMES = {
    "LR_RANGE_TEST": "LRRangeTest",
    "ONE_CYCLE": "OneCycle",
    "WARMUP_LR": "WarmupLR",
    "WARMUP_DECAY_LR": "WarmupDecayLR",
    "WARMUP_COSINE_LR": "WarmupCosineLR",
    "WARMUP_LOG_RATE": "log",
    "WARMUP_LINEAR_RATE": "linear",
}
_NAMES |= {
    parameter.upper(): parameter
    for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
    for parameter in inspect.signature(schedule.__init__).parameters
    if parameter not in ("self", "optimizer", "args", "kwargs")
}


def __getattr__(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
