"""The run directory: its files, and the contents of run.json and state.json.

RUN/run.json                what was launched; written once per attempt, before anything starts
RUN/lock                    held while a process of the run may write here
RUN/state.json              a `RunStatus`; replaced atomically by the supervisor
RUN/config.json             the config as the user wrote it, with --set applied
RUN/resolved.json           every value that the run uses
RUN/recording.sqlite        what the hub heard
RUN/logs/<attempt>/         rank-N.log, launcher.log, supervisor.log (in the first one of each launch);
                            stacks-rank-N.txt (stack dumps of a rank), stacks-1.txt, ... (dumps of all ranks at one
                            moment), evidence-1/, ... (what belongs to them: Flight Recorder of each rank, NCCL RAS),
                            flight-rank-N.json (Flight Recorder of a rank that failed)
RUN/checkpoints/step-N/     unless zerotop.checkpoint.folder says otherwise
SOCKETS/                    /tmp/zerotop-UID/<8 characters>/: telemetry, ranks, screens, commands
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from runtime.process.atomic_file import replace_text
from runtime.wire.messages import RunStatus

RUN_VARIABLE = "ZEROTOP_RUN"
"""Environment variable of every rank: path of the run directory. If it is set, initialize() starts telemetry and
control."""
ATTEMPT_VARIABLE = "ZEROTOP_ATTEMPT"
"""Number of the attempt, from 1."""
SUPERVISOR_VARIABLE = "ZEROTOP_SUPERVISOR_PID"
"""Process id of the supervisor."""
RESUME_VARIABLE = "ZEROTOP_RESUME"
""""1": continue from the newest complete checkpoint."""


BLOCKED_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
"""Signals that are blocked when torchrun and the ranks start: see runtime/telemetry/stopsignal.py."""
STACKS_SIGNAL = signal.SIGUSR2
"""Signal that makes a rank dump the stacks of its threads; it kills a process without a handler."""


LAUNCHER_LOG = "launcher.log"
"""Name of the log of what starts the ranks, torchrun or a wrapped command, in the attempt's folder."""


def rank_stacks(logs: Path, rank: int) -> Path:
    """The file to which a rank appends its stack dumps; `logs`: the attempt's folder."""
    return logs / f"stacks-rank-{rank}.txt"


def flight_file(folder: Path, rank: int) -> Path:
    """The file with a rank's Flight Recorder in `folder`: an evidence folder, or that of the attempt for a rank that
    failed."""
    return folder / f"flight-rank-{rank}.json"


def evidence_folder(logs: Path, number: int) -> Path:
    """The folder of what belongs to stacks-`number`.txt; `logs`: the attempt's folder."""
    return logs / f"evidence-{number}"


class BranchPoint(BaseModel):
    """Where a run left another one: the checkpoint from which it started."""

    model_config = ConfigDict(extra="ignore")

    run: str
    step: int
    path: str  # the other run's directory


class RunFile(BaseModel):
    """The contents of run.json."""

    model_config = ConfigDict(extra="ignore")

    name: str
    created_wall_s: float
    attempt: int
    host: str
    boot_id: str
    supervisor_pid: int = 0
    supervisor_start: float = 0.0  # psutil's create_time(): with the pid and boot id it identifies one process for good
    nproc: int  # 0: a wrapped command that has not said how many ranks it starts
    device: str  # "cpu" | "cuda"
    config_path: str  # where the user's file lay, for messages
    config_folder: str  # globs in the config are relative to this
    working_folder: str = ""  # where launch was called; a script's relative paths start there, in every attempt
    script: list[str] | None = None  # SCRIPT.py and its arguments; None: the built-in trainer
    command: list[str] | None = None  # started in torchrun's place, with the same environment; None: torchrun
    wrapped: list[str] | None = None  # the user's own command, which `zerotop run` has wrapped; None: a run of ours
    as_deepspeed: bool = False  # whether `import deepspeed` gives our engine
    sockets: str
    version: str = ""
    branch_of: BranchPoint | None = None  # None: it began at step 0


class Sockets:
    """The four Unix sockets of a run, as paths and as ZeroMQ endpoints.

    No socket at either end may have ZeroMQ's heartbeats on. A peer that leaves while the receiver's queue is full makes
    libzmq abort the process at the next heartbeat (`!_io_error` in stream_engine_base.cpp). They are not needed either:
    the kernel tells the end of a Unix socket at once, and the tunnel of an SSH session is watched by ssh itself.
    """

    names = ("telemetry", "ranks", "screens", "commands")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """Path of the socket `name`."""
        assert name in self.names
        return self.folder / name

    def endpoint(self, name: str) -> str:
        """ZeroMQ endpoint of the socket `name`."""
        return f"ipc://{self.path(name)}"


LIVE_TOPIC = b"live"
"""Topic of packets to screens. A screen gets a snapshot of its own by subscribing to SNAPSHOT_TOPIC + a unique
suffix."""
SNAPSHOT_TOPIC = b"snapshot/"


def read_run(run: Path) -> RunFile:
    """Read run.json of a run directory."""
    return RunFile.model_validate_json((run / "run.json").read_bytes())


def read_status(run: Path) -> RunStatus:
    """Read state.json of a run directory."""
    return RunStatus.model_validate_json((run / "state.json").read_bytes())


def write_json(path: Path, data: BaseModel | dict) -> None:  # type: ignore[type-arg]
    """Write JSON to `path` atomically, with mode 0600."""
    text = data.model_dump_json(indent=1) if isinstance(data, BaseModel) else json.dumps(data, indent=1)
    replace_text(path, text + "\n")


def boot_id() -> str:
    """The kernel's boot id; empty if there is none (not Linux)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
