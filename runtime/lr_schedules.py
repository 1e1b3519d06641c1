"""DeepSpeed's learning-rate schedules by class, for scripts: `from runtime.lr_schedules import WarmupLR`."""

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
