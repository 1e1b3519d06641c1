"""What a checkpoint says of itself before its tensors are opened, and which complete checkpoints a folder holds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"
MODEL_FILES = "model"
"""Folder in a checkpoint: what is known of the model beside its tensors (config.json, the tokenizer)."""
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; the message says which and why."""


@dataclass(frozen=True)
class Wanted:
    """What to load of a checkpoint, beside parameters and buffers."""

    strict: bool = True
    """The model and the checkpoint must have the same parameters and buffers."""
    optimizer: bool = True
    scheduler: bool = True
    progress: bool = True
    """Step counts, loss scale, random numbers."""


EVERYTHING = Wanted()


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    step: int
    """Optimizer steps taken, skipped ones included."""
    optimizer_step: int
    """Updates taken: Adam's bias correction counts these. 0: there are no optimizer states yet."""
    foreign_steps: int = 0
    """Steps of an earlier checkpoint that was loaded without its optimizer states."""
    world_size: int
    stage: int
    precision: str
    optimizer: str
    groups: int
    """Parameter groups of the optimizer."""
    lr_factor: float = 1.0
    config_digest: str
    shapes: dict[str, list[int]]
    """Of every parameter, trained or frozen."""
    frozen: list[str]
    """Parameters without optimizer states."""
    dtypes: dict[str, str] = {}
    """Of the parameters that compute in another dtype than `precision`: torch's name of it."""
    buffers: dict[str, list[int]] | None = None
    """Shapes of the persistent buffers, whose tensors are stored flattened. None: an earlier version did not say."""


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError where there is none that this version can read."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path / MANIFEST} cannot be read: {f'{where}: ' if where else ''}{first['msg']}"
        ) from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.format}, this version reads {FORMAT}")
    return manifest


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in `folder`; one being written, or without a readable manifest,
    does not count."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            found.append((read_manifest(path).step, path.stat().st_mtime_ns, path))
        except CheckpointError:
            continue
    return max(found)[2] if found else None


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest complete step checkpoints of a run; returns what went."""
    steps = sorted((p for p in folder.glob("step-*") if (p / MANIFEST).is_file()), key=lambda p: p.name)
    gone = steps[: max(0, len(steps) - keep)]
    for path in gone:
        doomed = path.with_name(f".{path.name}.pruned")
        path.rename(doomed)  # from now on no reader takes it for complete
        shutil.rmtree(doomed)
    return gone


def step_tag(step: int) -> str:
    """The name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"
