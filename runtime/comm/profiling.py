"""Ranges for profilers: the engine's work, with the unit and the stage.

torch.profiler records them, and torch.autograd.profiler.emit_nvtx() passes them to Nsight Systems.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

_NOTHING: AbstractContextManager[Any] = nullcontext()


def profiler_range(work: str, stage: int, name: str) -> AbstractContextManager[Any]:
    """A range that profilers show as "zero2.reduce_scatter: blocks.3". Costs one test of a flag if no profiler runs.

    Updates and downloads of offloaded states run on a thread of their own, which torch.profiler shows only with
    _ExperimentalConfig(profile_all_threads=True).
    """
    if profiler._is_profiler_enabled:
        return profiler.record_function(f"zero{stage}.{work}: {name}")
    return _NOTHING
