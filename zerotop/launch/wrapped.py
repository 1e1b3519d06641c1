"""The command line and environment of a command that `zerotop run` wraps: the user's own, with as little changed as a
screen needs."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.config import ConfigError, Resolved
from runtime.wire.rundir import ATTEMPT_VARIABLE, RUN_VARIABLE, SUPERVISOR_VARIABLE, RunFile
from zerotop.clean import clean
from zerotop.launch.torchrun import AS_DEEPSPEED, with_import_path, with_path_in_front
from zerotop.probe.nvml import count_devices
from zerotop.rundir.directory import RunEntry
from zerotop.rundir.paths import RunError

INJECTED = Path(__file__).with_name("inject")
"""The folder that leads PYTHONPATH: see its sitecustomize.py."""
_CHILD = Path(__file__).with_name("end_with_supervisor.py")


def command(run: RunFile) -> list[str]:
    """The user's command, ended by SIGTERM if the supervisor dies."""
    assert run.wrapped
    return [sys.executable, "-I", "-S", str(_CHILD), *run.wrapped]


def environment(
    run: RunFile, path: Path, *, supervisor_pid: int, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """`base` with the variables by which Python processes find their run."""
    variables = with_import_path(dict(base))
    if run.as_deepspeed:
        variables = with_path_in_front(variables, AS_DEEPSPEED)
    return with_path_in_front(variables, INJECTED) | {
        RUN_VARIABLE: str(path),
        ATTEMPT_VARIABLE: str(run.attempt),
        SUPERVISOR_VARIABLE: str(supervisor_pid),
        "PYTHONUNBUFFERED": "1",
        # Older entries are overwritten: how far the collectives have come is counted beside them.
        "TORCH_FR_BUFFER_SIZE": variables.get("TORCH_FR_BUFFER_SIZE", "2000"),
    }


def checked_command(words: Sequence[str], nproc: int | None) -> list[str]:
    """The command to start: `words`, or with `nproc` torchrun with so many ranks of them. Raises RunError."""
    if not words:
        raise RunError("run needs a command: zerotop run -- python train.py, or zerotop run --nproc 8 train.py")
    words = list(words)
    if nproc is not None:
        if nproc < 1:
            raise RunError(f"--nproc: expected 1 or more, got {nproc}")
        python = Path(words[0]).name.startswith("python") and len(words) > 1
        script = words[1:] if python else words
        if not (script[0].endswith(".py") or (python and script[0] == "-m")):
            raise RunError(
                f"--nproc {nproc} starts so many ranks of a Python script with torchrun, and {script[0]} is none: "
                "leave --nproc out to run the command as it is"
            )
        python_path = words[0] if python else sys.executable
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", str(nproc)]
        words = [python_path, *torchrun, *script]
    elif words[0].endswith(".py") and not os.access(words[0], os.X_OK):
        words = [sys.executable, *words]
    if shutil.which(words[0]) is None:
        raise RunError(f"{words[0]}: there is no such command")
    first = words[1] if len(words) > 1 and Path(words[0]).name.startswith("python") else ""
    if first.endswith(".py") and not Path(first).is_file():
        raise RunError(f"{first}: there is no such script")
    return words


def refuse_trainer_keys(raw: Mapping[str, Any], origin: str) -> None:
    """A wrapped command trains as it likes: of a config only the section "zerotop" counts. Raises ConfigError."""
    if others := [key for key in raw if key != "zerotop"]:
        raise ConfigError(
            f'{", ".join(others)}: zerotop run takes only the section "zerotop" (restarts, telemetry): the command '
            "configures its own training. zerotop launch trains with a DeepSpeed config",
            origin,
        )


def refuse_wrapped(entry: RunEntry, what: str) -> None:
    """A command of the user's own can't be continued from a checkpoint: zerotop knows neither its config nor how its
    script loads. what: what was asked for. Raises RunError."""
    if entry.run.wrapped:
        raise RunError(
            f"{what} can't continue {entry.name}, which is a command of your own: start it again, and let its script "
            f"load the checkpoint: zerotop run -- {clean(shlex.join(entry.run.wrapped))}"
        )


def without_restarts(resolved: Resolved) -> Resolved:
    """The settings with no restarts, unless the config says how many: a command of the user's starts from its beginning
    each time, perhaps over its own output."""
    zerotop = resolved.zerotop
    if "limit" in zerotop.restarts.model_fields_set:
        return resolved
    restarts = zerotop.restarts.model_copy(update={"limit": 0})
    return resolved.model_copy(update={"zerotop": zerotop.model_copy(update={"restarts": restarts})})


def has_gpus() -> bool:
    """Whether this machine has NVIDIA GPUs."""
    return count_devices()[0] > 0
