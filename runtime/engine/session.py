"""The run that this process is a rank of."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.comm import Comm
from runtime.config import Resolved
from runtime.telemetry import NullTelemetry, Telemetry, stopsignal
from runtime.wire.messages import Hello
from runtime.wire.rundir import ATTEMPT_VARIABLE, RESUME_VARIABLE, RUN_VARIABLE, RunFile, boot_id, read_run


@dataclass
class Session:
    """The run that this process is a rank of; without ZEROTOP_RUN there is none, and telemetry does nothing."""

    rank: int
    local_rank: int
    link: Telemetry | NullTelemetry
    """Commands, events and the heartbeat."""
    recorder: Telemetry | NullTelemetry
    """What the training thread writes to; does nothing under zerotop.telemetry.enabled = false."""
    folder: Path | None = None
    run: RunFile | None = None
    attempt: int = 1
    resume: bool = False
    step: Callable[[], int] = lambda: 0
    """The engine's finished steps, for a goodbye from outside the engine."""
    number: int = 1
    """Counts the engines of this process in this run. The run watches and steers the first; later ones have telemetry
    that does nothing, and checkpoints in a folder of their own."""

    @classmethod
    def join(cls, rank: int, telemetry_enabled: bool = True) -> Session:
        """The session of this process, which stays reachable through `current_session`; or that of a later engine."""
        global _current
        number = 1 + _begun.get(os.environ.get(RUN_VARIABLE, ""), 0)
        link = Telemetry.from_environment(rank) if number == 1 else NullTelemetry()
        session = cls(
            rank, int(os.environ.get("LOCAL_RANK", "0")), link, link if telemetry_enabled else NullTelemetry()
        )
        session.number = number
        if name := os.environ.get(RUN_VARIABLE):
            session.folder, session.run = Path(name), read_run(Path(name))
            session.attempt = int(os.environ.get(ATTEMPT_VARIABLE, "1"))
            session.resume = os.environ.get(RESUME_VARIABLE) == "1"
        if number == 1:
            _current = session
            stopsignal.spare_data_workers()
        return session

    @classmethod
    def apart(cls, rank: int) -> Session:
        """Of an engine that does not train: the run neither watches nor steers it, and it is none of its engines."""
        return cls(rank, int(os.environ.get("LOCAL_RANK", "0")), NullTelemetry(), NullTelemetry(), number=0)

    def begin(self, hello: Hello) -> None:
        """The engine is complete: from now on it counts."""
        run = os.environ.get(RUN_VARIABLE, "")
        if run:
            _begun[run] = _begun.get(run, 0) + 1
        self.link.start(hello)

    def hello(self, config: Resolved, comm: Comm, module: nn.Module, start_step: int, knobs: dict[str, Any]) -> Hello:
        device_name, device_uuid = platform.machine(), ""
        if comm.device.type == "cuda":
            properties = torch.cuda.get_device_properties(comm.device)
            device_name, device_uuid = properties.name, f"GPU-{properties.uuid}"
        section = config.zerotop
        scripted = self.run is not None and self.run.script is not None
        return Hello(
            run=self.run.name if self.run else "",
            attempt=self.attempt,
            rank=comm.rank,
            local_rank=self.local_rank,
            world_size=comm.world_size,
            host=platform.node(),
            pid=os.getpid(),
            boot_id=boot_id(),
            wall_s=time.time(),
            mono_ns=time.monotonic_ns(),
            device=str(comm.device),
            device_name=device_name,
            device_uuid=device_uuid,
            backend=comm.backend,
            config_digest=config.digest(),
            model_name=type(module).__name__
            if scripted
            else section.model.preset or section.model.path or type(module).__name__,
            parameters=sum(p.numel() for p in module.parameters()),
            stage=config.stage,
            precision=config.precision,
            micro_batch=config.micro_batch,
            accumulation=config.accumulation,
            global_batch=config.global_batch,
            seq_len=None if scripted else section.data.seq_len,
            steps=section.train.steps,
            start_step=start_step,
            torch_version=torch.__version__,
            telemetry_hz=section.telemetry.hz,
            knobs=knobs,
        )


_current: Session | None = None
_begun: dict[str, int] = {}
"""Engines of this process, by run."""


def current_session() -> Session | None:
    """The session that initialize() joined first, if any: how __main__ says goodbye for a script that failed."""
    return _current
