"""A run directory without a run: what the commands find, list and read."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import psutil

from runtime.wire.messages import RunStatus
from runtime.wire.rundir import RunFile, boot_id, write_json


def write_run(state_home: Path, name: str, sockets: Path, status: RunStatus, **changes: Any) -> Path:
    """RUN/run.json and RUN/state.json under the XDG state home. This process is the supervisor: a live state stands."""
    run = state_home / "zerotop" / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "name": name,
        "created_wall_s": time.time(),
        "attempt": 1,
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "supervisor_pid": psutil.Process().pid,
        "supervisor_start": psutil.Process().create_time(),
        "nproc": 2,
        "device": "cpu",
        "config_path": "c.json",
        "config_folder": "/",
        "sockets": str(sockets),
    }
    write_json(run / "run.json", RunFile(**{**values, **changes}))
    write_json(run / "state.json", status)
    return run
