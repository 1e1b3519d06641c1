"""Ranges that profilers show: what the engine does for which unit, at which stage.

torch.profiler records them, and torch.autograd.profiler.emit_nvtx() hands them on to Nsight Systems.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

_NOTHING: AbstractContextManager[Any] = nullcontext()


def profiler_range(work: str, stage: int, name: str) -> AbstractContextManager[Any]:
    """Shown as "zero2.reduce_scatter: blocks.3/bfloat16". Costs a look at a flag where no profiler listens.

    Updates and downloads of offloaded states run on a thread of their own, which torch.profiler shows when it is told
    to look at all threads (_ExperimentalConfig(profile_all_threads=True)).
    """
    if profiler._is_profiler_enabled:
        return profiler.record_function(f"zero{stage}.{work}: {name}")
    return _NOTHING
