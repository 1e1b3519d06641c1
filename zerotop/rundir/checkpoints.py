"""Finds the complete checkpoint that a user names: a folder, a run, or a step of a run. Torch-free."""

from __future__ import annotations

import json
import re
from pathlib import Path

from runtime.checkpoint.format.folder import newest, step_tag
from runtime.checkpoint.format.manifest import CheckpointError, read_manifest
from runtime.wire.rundir import RunFile
from zerotop.rundir.directory import RunEntry, find_run, read_entry
from zerotop.rundir.paths import RunError, runs_home


def checkpoints_of(entry: RunEntry) -> Path:
    """The folder into which the run saves; it need not exist."""
    try:
        chosen = json.loads((entry.path / "resolved.json").read_bytes())["zerotop"]["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        chosen = None  # a launch that was interrupted has not written it
    return checkpoints_folder(entry.path, entry.run, chosen)


def checkpoints_folder(path: Path, run: RunFile, chosen: str | None) -> Path:
    """The folder into which the run in `path` saves; chosen: zerotop.checkpoint.folder of its config."""
    if chosen:
        return Path(run.config_folder, Path(chosen).expanduser()) / run.name
    return path / "checkpoints"


def find_checkpoint(text: str) -> Path:
    """The complete checkpoint that `text` names: the folder of a checkpoint; a folder of checkpoints or a run, of which
    the newest; or RUN/step-100. A folder that exists takes precedence over a run of the same name.

    Raises CheckpointError if there is none, RunError if the run can't be read.
    """
    text = text.rstrip("/") or text
    path = Path(text).expanduser()
    found = _in_folder(path) if path.is_dir() else None
    if found is not None:
        return found.absolute()
    name, _, rest = text.partition("/")
    if not (runs_home() / name / "run.json").exists():
        raise _nothing(text, path, name)
    entry = find_run(name)
    folder = checkpoints_of(entry)
    if not rest:
        found = newest(folder)
    else:
        step = re.fullmatch(r"step-(\d+)", rest)
        found = _in_folder(folder / (step_tag(int(step[1])) if step else rest))
    if found is None:
        raise CheckpointError(_lacking(entry, folder, rest))
    return found


def _in_folder(path: Path) -> Path | None:
    """`path` if it is a complete checkpoint, else the newest one in it or, for a run directory, of the run."""
    if not path.is_dir():
        return None
    if (path / "manifest.json").exists():
        read_manifest(path)
        return path
    if (path / "run.json").exists():
        return newest(checkpoints_of(read_entry(path)))
    return newest(path)


def _nothing(text: str, path: Path, name: str) -> Exception:
    if path.is_dir():
        what = "a checkpoint without its manifest" if any(path.glob("*.distcp")) else "no complete checkpoint"
        return CheckpointError(
            f"{text} is {what}: expected one (it has manifest.json), a folder that holds some, a run's name, or "
            "RUN/step-100"
        )
    if path.exists():
        return CheckpointError(f"{text} is a file: expected the folder of a checkpoint, or a run's name")
    try:
        find_run(name)
    except RunError as error:
        return RunError(f"{text} is not a folder, and {error}")
    raise AssertionError(f"{name} was created meanwhile")


def _lacking(entry: RunEntry, folder: Path, rest: str) -> str:
    steps = sorted(path.parent.name for path in folder.glob("*/manifest.json") if not path.parent.name.startswith("."))
    there = f"it has {', '.join(steps[-5:])}" if steps else "it has none yet"
    what = f"checkpoint {rest}" if rest else "complete checkpoint"
    way_out = f": zerotop checkpoint {entry.name} makes one" if entry.live else ""
    return f"run {entry.name} has no {what} in {folder}; {there}{way_out}"
