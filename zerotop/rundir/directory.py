"""Run directories: create, list and find them, and read the state of each run, also if its supervisor was killed."""

from __future__ import annotations

import difflib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from runtime.wire.messages import LIVE_STATES, RunStatus
from runtime.wire.rundir import RunFile, Sockets, boot_id, read_run, read_status
from zerotop.rundir.paths import RunError, make_private_folder, runs_home

SUPERVISOR_MODULE = "zerotop.supervise"
"""What `python -m` starts as the supervisor."""
START_GRACE_S = 60.0
"""A run without a supervisor counts as starting for this long; after that its launch was interrupted."""
_START_TOLERANCE_S = 2.0
_CHOICES_SHOWN = 5

__all__ = [
    "RunEntry",
    "RunError",
    "effective_status",
    "find_run",
    "list_runs",
    "make_run_folder",
    "read_entry",
    "runs_home",
    "supervisor_alive",
]


@dataclass(frozen=True)
class RunEntry:
    """One run as found in its directory. `status` is corrected for a supervisor that was killed."""

    path: Path
    run: RunFile
    status: RunStatus
    sockets: Sockets

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.run.name

    @property
    def live(self) -> bool:
        """Whether the run has not ended."""
        return self.status.state in LIVE_STATES

    @property
    def here(self) -> bool:
        """Whether the run is (or was) on this host, so that its sockets can be reached without SSH."""
        return self.run.host == socket.gethostname()

    def logs(self, attempt: int | None = None) -> Path:
        """The log folder of an attempt, by default the newest."""
        return self.path / "logs" / str(self.run.attempt if attempt is None else attempt)


def make_run_folder(name: str) -> Path:
    """Create the run directory (0700), which claims the name; raises RunError if it exists or cannot be created."""
    home = make_private_folder(runs_home())
    folder = home / name
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise RunError(existing_message(name)) from None
    except OSError as error:
        raise RunError(f"can't create the run directory {folder}: {error.strerror}") from None
    return folder


def existing_message(name: str) -> str:
    """Why the name is taken, and what to do."""
    try:
        entry = read_entry(runs_home() / name)
    except RunError:
        return f"{runs_home() / name} exists and is not a run: choose another --name"
    state = entry.status.state
    if state in LIVE_STATES:
        return f"run {name} exists ({state}): zerotop attach {name} opens it, or choose another --name"
    way_out = "choose another --name" if entry.run.wrapped else "--resume continues it, or choose another --name"
    return f"run {name} exists ({state}): {way_out}"


def read_entry(path: Path) -> RunEntry:
    """Raises RunError if `path` is not a run directory, or one that this version cannot read."""
    try:
        run = read_run(path)
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (no run.json in it)") from None
    except (OSError, ValidationError) as error:
        raise RunError(f"can't read {path / 'run.json'}: {_short(error)}") from None
    return RunEntry(path, run, effective_status(path, run), Sockets(run.sockets))


def list_runs() -> list[RunEntry]:
    """All runs of this user, newest attempt first, without directories that cannot be read."""
    try:
        folders = [folder for folder in runs_home().iterdir() if (folder / "run.json").exists()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"can't read {runs_home()}: {error.strerror}") from None
    entries = []
    for folder in folders:
        try:
            entries.append(read_entry(folder))
        except RunError:
            continue
    return sorted(entries, key=lambda entry: entry.status.started_wall_s or entry.run.created_wall_s, reverse=True)


def find_run(name: str | None = None, *, live_only: bool = False) -> RunEntry:
    """The run called `name`; None: the newest live one. Raises RunError with the choices if there is none.

    With `live_only`, a run that has ended is an error that says how it ended.
    """
    if name is not None:
        path = runs_home() / name
        if "/" in name or name in ("", ".", "..") or not (path / "run.json").exists():
            raise RunError(f"there is no run called {name!r}. {_choices(name)}")
        entry = read_entry(path)
        if live_only and not entry.live:
            raise RunError(f"run {name} is over ({entry.status.state}): {entry.status.reason or 'it has ended'}")
        return entry
    for entry in list_runs():
        if entry.live:
            return entry
    raise RunError(f"no run is live. {_choices()}")


def find_any_run(name: str | None = None) -> RunEntry:
    """The run called `name`; without a name the newest live one, else the newest. Raises RunError."""
    if name is None:
        runs = list_runs()
        if runs and not any(entry.live for entry in runs):
            return runs[0]
    return find_run(name)


def _choices(wanted: str = "") -> str:
    """The run whose name is most similar to `wanted`, and the newest ones."""
    entries = list_runs()
    if not entries:
        return f"There are no runs yet in {runs_home()}: zerotop launch CONFIG starts one"
    near = difflib.get_close_matches(wanted.lower(), [entry.name for entry in entries], n=1, cutoff=0.6)
    guess = f"Did you mean {near[0]}? " if near else ""
    shown = ", ".join(f"{entry.name} ({entry.status.state})" for entry in entries[:_CHOICES_SHOWN])
    more = f" and {len(entries) - _CHOICES_SHOWN} more (zerotop ls)" if len(entries) > _CHOICES_SHOWN else ""
    return f"{guess}Runs: {shown}{more}"


def supervisor_alive(run: RunFile, path: Path) -> bool:
    """Whether the process in run.json is still that run's supervisor. Only meaningful on the run's host."""
    if not run.supervisor_pid or run.boot_id != boot_id():
        return False
    try:
        process = psutil.Process(run.supervisor_pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if abs(process.create_time() - run.supervisor_start) <= _START_TOLERANCE_S:
            return True
        # create_time() moves when the wall clock is set; the command line does not.
        return SUPERVISOR_MODULE in process.cmdline() and str(path) in process.cmdline()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return False  # another user's process has got the number


def effective_status(path: Path, run: RunFile) -> RunStatus:
    """The content of state.json, corrected if it says that the run is live and the supervisor is gone.

    A run on another host (the home is shared) cannot be checked from here: its state.json is used as it is.
    """
    try:
        status = read_status(path)
    except FileNotFoundError:
        status = RunStatus(name=run.name, state="starting", attempt=run.attempt, started_wall_s=run.created_wall_s)
    except (OSError, ValidationError) as error:
        status = RunStatus(
            name=run.name, state="failed", attempt=run.attempt, reason=f"state.json can't be read: {_short(error)}"
        )
    if status.state not in LIVE_STATES or run.host != socket.gethostname() or supervisor_alive(run, path):
        return status
    if not run.supervisor_pid:
        if time.time() - (status.started_wall_s or run.created_wall_s) < START_GRACE_S:
            return status
        return status.model_copy(update={"state": "failed", "reason": "its launch was interrupted before anything ran"})
    cause = "the machine was restarted" if run.boot_id != boot_id() else "the supervisor died (killed?)"
    # The ranks outlive a killed supervisor long enough to save, so the newest checkpoint may be newer than state.json.
    saved = max(checkpoint_steps(path), default=status.last_checkpoint_step)
    return status.model_copy(
        update={
            "state": "failed",
            "step": max(status.step, saved or 0),
            "reason": f"{cause}; last known step {max(status.step, saved or 0)}",
            "last_checkpoint_step": saved,
            "ended_wall_s": _last_written(path),
        }
    )


def checkpoint_steps(path: Path) -> list[int]:
    """Steps of the complete checkpoints in the run directory; other checkpoint folders are not searched."""
    found = (folder.name.split("-", 1)[1] for folder in path.glob("checkpoints/step-*") if folder.is_dir())
    return [int(step) for step in found if step.isdigit()]


def _last_written(path: Path) -> float | None:
    try:
        return os.stat(path / "state.json").st_mtime
    except OSError:
        return None


def _short(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0]
