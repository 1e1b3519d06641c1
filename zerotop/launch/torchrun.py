"""The command line and environment that start the ranks of one node."""

from __future__ import annotations

import importlib.metadata
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from runtime.wire.rundir import (
    ATTEMPT_VARIABLE,
    RESUME_VARIABLE,
    RUN_VARIABLE,
    SUPERVISOR_VARIABLE,
    RunFile,
)
from runtime.wire.signature import GROUP_KEY_VARIABLE

AS_DEEPSPEED = Path(__file__).with_name("as_deepspeed")
"""The folder in which `deepspeed` is our engine."""
_FOREIGN = re.compile(
    "(PET|TORCHELASTIC)_.*"  # torchrun takes PET_NNODES for --nnodes, and so on for every option
    "|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
)
"""Variables that configure torchrun, or that it sets for its ranks."""


def command(run: RunFile, path: Path) -> list[str]:
    """torchrun for one node, with nothing that listens beyond this machine.

    Its usual rendezvous (`localhost:0`) is a TCP store that listens on every interface and unpickles what it receives;
    a file in the private sockets folder does the same for one node.
    """
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(run.nproc)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", str(Path(run.sockets) / f"rendezvous-{run.attempt}")),
        *("--rdzv-conf", "store_type=file", "--rdzv-id", run.name, "--local-addr", "127.0.0.1"),
        *("--max-restarts", "0", "--log-dir", str(path / "logs" / str(run.attempt) / "torchrun")),
        *("-m", "runtime"),  # a script and its arguments are in run.json: torchrun would take some for its own
    ]


def environment(
    run: RunFile, path: Path, *, supervisor_pid: int, resume: bool, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """`base` with the variables by which the ranks find their run. What the user has set stays, except what would
    configure this torchrun: launch may be called from a process of another one."""
    variables = {name: value for name, value in base.items() if not _FOREIGN.fullmatch(name)}
    variables |= {
        RUN_VARIABLE: str(path),
        ATTEMPT_VARIABLE: str(run.attempt),
        SUPERVISOR_VARIABLE: str(supervisor_pid),
        RESUME_VARIABLE: "1" if resume else "0",
        GROUP_KEY_VARIABLE: secrets.token_hex(32),
        "PYTHONSAFEPATH": "1",  # a user's own runtime.py in the working directory must not be picked up
        "PYTHONUNBUFFERED": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    variables.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // run.nproc)))
    if sys.platform == "linux":  # one node: the backends' own connections stay on loopback too
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
        variables.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if run.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    variables = with_import_path(variables)
    return with_path_in_front(variables, AS_DEEPSPEED) if run.as_deepspeed else variables


def with_path_in_front(variables: dict[str, str], folder: Path) -> dict[str, str]:
    """`variables` with `folder` as the first one in which Python looks for modules."""
    before = variables.get("PYTHONPATH", "")
    return variables | {"PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def with_import_path(variables: dict[str, str]) -> dict[str, str]:
    """Make `-P -m zerotop...` work from a source folder that was never installed."""
    try:
        importlib.metadata.distribution("zerotop")
    except importlib.metadata.PackageNotFoundError:
        checkout = str(Path(__file__).resolve().parents[2])
        paths = [part for part in variables.get("PYTHONPATH", "").split(os.pathsep) if part]
        if checkout not in paths:
            variables["PYTHONPATH"] = os.pathsep.join([checkout, *paths])
    return variables


def _cores() -> int:
    """Cores this process may use: a container or Slurm often gives fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
