"""The connection of an engine to the run that this process belongs to."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.comm import Comm
from runtime.config import Resolved
from runtime.engine.efficiency import model_flops, peak_flops
from runtime.process.forked import at_exit
from runtime.telemetry import NullTelemetry, Telemetry, stopsignal
from runtime.telemetry.watching.introduction import last_error
from runtime.wire.messages import Hello
from runtime.wire.rundir import ATTEMPT_VARIABLE, RESUME_VARIABLE, RUN_VARIABLE, RunFile, boot_id, read_run
from runtime.wire.startnote import end_start

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass
class Session:
    """An engine's connection to the run; without ZEROTOP_RUN there is no run, and telemetry does nothing."""

    rank: int
    local_rank: int
    link: Telemetry | NullTelemetry
    """Channel for commands, events and heartbeats."""
    recorder: Telemetry | NullTelemetry
    """Telemetry of the training thread; does nothing if zerotop.telemetry.enabled is false."""
    folder: Path | None = None
    """The run directory."""
    run: RunFile | None = None
    """The contents of run.json."""
    attempt: int = 1
    resume: bool = False
    """Whether to continue from the newest checkpoint."""
    step: Callable[[], int] = lambda: 0
    """Returns the engine's finished optimizer steps, for a goodbye sent from outside the engine."""
    number: int = 1
    """Number of the engine in this process and run, from 1; 0: unattached. Only the first has telemetry and commands;
    later ones save to folders of their own."""

    @classmethod
    def join(cls, rank: int, telemetry_enabled: bool = True) -> Session:
        """Create the session of the next engine in this process; `current_session` returns the first one."""
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
    def unattached(cls, rank: int) -> Session:
        """Create a session without run, telemetry or commands, for an engine that only evaluates."""
        return cls(rank, int(os.environ.get("LOCAL_RANK", "0")), NullTelemetry(), NullTelemetry(), number=0)

    def begin(self, hello: Hello) -> None:
        """Count the engine, now that it is complete, and start telemetry with `hello`."""
        run = os.environ.get(RUN_VARIABLE, "")
        if run:
            _begun[run] = _begun.get(run, 0) + 1
        end_start()
        self.link.start(hello)
        if self.run is not None and self.run.wrapped and self.number == 1:
            at_exit(self._leave)  # after `zerotop launch`, runtime/__main__.py says goodbye

    def _leave(self) -> None:
        error = last_error()
        self.link.goodbye("failed" if error else "finished", self.step(), error)

    def hello(self, config: Resolved, comm: Comm, module: nn.Module, start_step: int, knobs: dict[str, Any]) -> Hello:
        """The message that introduces this rank to the hub."""
        device_name, device_uuid = platform.machine(), ""
        if comm.device.type == "cuda":
            properties = torch.cuda.get_device_properties(comm.device)
            device_name, device_uuid = properties.name, f"GPU-{properties.uuid}"
        section = config.zerotop
        scripted = self.run is not None and (self.run.script is not None or self.run.wrapped is not None)
        flops, (peak, peak_note) = model_flops(module, config), peak_flops(config, comm.device, device_name)
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
            else section.model.preset or _short(section.model.path) or type(module).__name__,
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
            model_flops_per_token=flops.model if flops else None,
            hardware_flops_per_token=flops.hardware if flops else None,
            peak_flops=peak,
            peak_note=peak_note,
            knobs=knobs,
        )


def _short(path: str | None) -> str:
    """A model's id on the hub as it is; of a path only the last part."""
    return "" if path is None else path if _HUB_ID.fullmatch(path) else Path(path).name


_current: Session | None = None
_begun: dict[str, int] = {}
"""Run directory -> number of engines that this process has started in it."""


def current_session() -> Session | None:
    """The session of the first engine in this process, if any; __main__ sends the goodbye of a failed script with
    it."""
    return _current
