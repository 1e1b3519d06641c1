"""Joins this process to its run, as one rank of a trainer that is not ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.telemetry.null import NullTelemetry
from runtime.telemetry.publisher import Telemetry
from runtime.telemetry.watching.introduction import Place, Trainer
from runtime.telemetry.watching.watcher import Watcher
from runtime.wire.rundir import RUN_VARIABLE, RunFile, read_run


class WatchError(TypeError):
    """watch() was called with something that it can't watch. The message says what it takes."""


def start_watching(trainer: Trainer, *, replaces: bool = False) -> Watcher:
    """The watcher of this process; `watch` and the integrations call it. replaces: it takes the place of one that was
    not closed, because its training failed and is tried again; otherwise that one raises WatchError."""
    global _current
    if replaces and _current is not None:
        _current.hand_over()
    if _current is not None and not _current.closed:
        raise WatchError(
            f"this process is watched already (as {_current.trainer.name}): call watch() once, or close() the first "
            "watcher"
        )
    place = find_place(trainer.modules)
    link, run = join(place.rank)
    watcher = Watcher(link, place, trainer, run)
    if isinstance(link, Telemetry):
        _current = watcher
    return watcher


_current: Watcher | None = None


def current_watcher() -> Watcher | None:
    """The watcher of this process, if it has one that has not ended."""
    return _current if _current is not None and not _current.closed else None


def join(rank: int) -> tuple[Telemetry | NullTelemetry, RunFile | None]:
    """The telemetry of this process as `rank`, and its run; outside a run telemetry does nothing. Raises
    TelemetryError."""
    link = Telemetry.from_environment(rank)
    return link, read_run(Path(os.environ[RUN_VARIABLE])) if isinstance(link, Telemetry) else None


def find_place(modules: Sequence[Any]) -> Place:
    """Where this process stands, from torch.distributed, or else from the environment."""
    torch = sys.modules.get("torch")
    place = Place(
        rank=_number("RANK", _number("SLURM_PROCID", 0)),
        local_rank=_number("LOCAL_RANK", 0),
        world_size=_number("WORLD_SIZE", _number("SLURM_NTASKS", 1)),
    )
    if torch is None:
        return place
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        place.rank, place.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        place.backend = str(torch.distributed.get_backend())
    device = next((p.device for module in modules for p in module.parameters()), None)
    if device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(index)
        place.device, place.device_name = f"cuda:{index}", properties.name
        place.device_uuid = f"GPU-{properties.uuid}"
    return place


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default
