"""What a rank of a trainer that is not ours says of itself: its hello, its memory, its last error."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from runtime.telemetry.watching.control import Controls
from runtime.telemetry.watching.held import Held
from runtime.wire.messages import Hello, Memory
from runtime.wire.rundir import ATTEMPT_VARIABLE, RunFile, boot_id

ERROR_LINES = 40
"""Lines of an error to send in the goodbye."""


@dataclass
class Place:
    """Where a process stands in its job. Of one process: rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    backend: str = ""
    device: str = "cpu"
    device_name: str = ""
    device_uuid: str = ""


@dataclass
class Trainer:
    """What a trainer says of itself."""

    name: str
    """Its name and version, such as "transformers 5.24 Trainer"."""
    packages: Sequence[str] = ("torch",)
    """The modules whose versions matter to the watch; those of versions.SUPPORTED."""
    modules: Sequence[Any] = ()
    optimizers: Sequence[Any] = ()
    stage: int = 0
    precision: str = ""
    micro_batch: int = 0
    accumulation: int = 1
    steps: int | None = None
    start_step: int = 0
    seq_len: int | None = None
    model_name: str = ""
    controls: Controls = field(default_factory=Controls)
    counts_steps: bool = True
    late_results: bool = False
    """Whether the figures of a step come after its end: its result then waits for `log`, or for the next step."""


class Introduction:
    """Makes the hellos of one rank."""

    def __init__(self, place: Place, trainer: Trainer, run: RunFile | None) -> None:
        self._place, self._trainer, self._run = place, trainer, run

    def hello(self, lr_factor: float = 1.0) -> Hello:
        """The message that introduces this rank to the hub."""
        trainer, place = self._trainer, self._place
        knobs: dict[str, Any] = {"lr_factor": lr_factor, "telemetry_hz": 5.0, "log_level": "info"}
        if trainer.controls.set_log_interval is not None and trainer.controls.log_interval is not None:
            knobs["log_interval"] = trainer.controls.log_interval
        accumulation = max(1, trainer.accumulation)
        return Hello(
            run=self._run.name if self._run else "",
            attempt=attempt(),
            rank=place.rank,
            local_rank=place.local_rank,
            world_size=place.world_size,
            host=platform.node(),
            pid=os.getpid(),
            boot_id=boot_id(),
            wall_s=time.time(),
            mono_ns=time.monotonic_ns(),
            device=place.device,
            device_name=place.device_name or platform.machine(),
            device_uuid=place.device_uuid,
            backend=place.backend,
            config_digest="",
            model_name=trainer.model_name or _model_name(trainer.modules),
            parameters=_parameters(trainer.modules),
            stage=trainer.stage,
            precision=trainer.precision,
            micro_batch=trainer.micro_batch,
            accumulation=accumulation,
            global_batch=trainer.micro_batch * accumulation * place.world_size,
            seq_len=trainer.seq_len,
            steps=trainer.steps,
            start_step=trainer.start_step,
            torch_version=str(getattr(sys.modules.get("torch"), "__version__", "")),
            knobs=knobs,
            trainer=trainer.name,
            counts_steps=trainer.counts_steps,
            impossible=trainer.controls.impossible(),
        )


def process_memory(place: Place, held: Held | None = None) -> Memory:
    """This process's memory now, with what is known of its categories. It may be called from any thread."""
    allocated = reserved = used = total = retries = None
    torch = sys.modules.get("torch")
    if place.device.startswith("cuda") and torch is not None:
        stats = torch.cuda.memory_stats(place.device)
        allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
        retries = stats.get("num_alloc_retries")
        free, total = torch.cuda.mem_get_info(place.device)
        used = total - free
    return Memory(
        rank=place.rank,
        ledger=dict(held.on_device) if held else {},
        offloaded=dict(held.on_host) if held else {},
        rss_bytes=psutil.Process().memory_info().rss,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        alloc_retries=retries,
        device_used_bytes=used,
        device_total_bytes=total,
        host_total_bytes=psutil.virtual_memory().total,
        at_ns=time.monotonic_ns(),
    )


def last_error() -> str:
    """The exception that ends the script, once the interpreter has printed it; empty if there is none."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        return ""
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-ERROR_LINES:])


def attempt() -> int:
    """The number of the run's attempt to which this process belongs."""
    text = os.environ.get(ATTEMPT_VARIABLE, "1")
    return int(text) if text.isdecimal() else 1


def _model_name(modules: Sequence[Any]) -> str:
    if not modules:
        return ""
    inner = getattr(modules[0], "module", modules[0])  # of DistributedDataParallel
    return type(inner).__name__.removeprefix("FSDP")


def _parameters(modules: Sequence[Any]) -> int:
    """Number of elements of all parameters; of one that DeepSpeed has partitioned the whole."""
    return sum(int(getattr(p, "ds_numel", 0) or p.numel()) for module in modules for p in module.parameters())
