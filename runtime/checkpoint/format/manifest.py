"""manifest.json: step, shapes and origin of a checkpoint.   (torch-free)

It detects damage: it holds the size and SHA-256 of every other file, and a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.models.names import plain_name, plain_names

MANIFEST = "manifest.json"
MODEL_FILES = "model"
"""Folder in a checkpoint with config.json and the tokenizer."""
FORMAT = 1
_DIGEST = "digest"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read, or does not fit the model; the message says which and why."""


class Misnamed(CheckpointError, ValueError):
    """A folder or tag that can't be written to. DeepSpeed raises ValueError for it."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, truncated or changed."""


@dataclass(frozen=True)
class LoadOptions:
    """Which parts of a checkpoint to load."""

    strict: bool = True
    """Whether model and checkpoint must have the same parameters and buffers."""
    module: bool = True
    """Parameters and buffers."""
    optimizer: bool = True
    """Optimizer states and parameter groups."""
    scheduler: bool = True
    """The state of the LR scheduler."""
    progress: bool = True
    """Step counts, loss scale, RNG states and registered objects."""


LOAD_EVERYTHING = LoadOptions()


def _inside(name: str) -> str:
    """Refuse file names that lead out of the checkpoint's folder: a checkpoint may come from anybody."""
    if not re.fullmatch(r"(model/)?[A-Za-z0-9_.-]+", name) or name.rpartition("/")[2] in (".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in a checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0)]


class FileRecord(BaseModel):
    """Size and SHA-256 of one file of a checkpoint, as written."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    nbytes: Count
    sha256: str


class Manifest(BaseModel):
    """The contents of manifest.json."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    step: Count
    """Optimizer steps taken, skipped ones included."""
    optimizer_step: Count
    """Optimizer updates applied, which Adam's bias correction counts. 0: there are no optimizer states yet."""
    foreign_steps: int = 0
    """Steps of an earlier checkpoint that was loaded without its optimizer states."""
    world_size: Annotated[int, Field(ge=1)]
    stage: int
    precision: str
    optimizer: str
    """Its type; "none": the engine had none."""
    groups: int
    """Parameter groups of the optimizer."""
    lr_factor: float = 1.0
    config_digest: str
    shapes: dict[str, list[Count]]
    """Shape of every parameter, trained or frozen, by name."""
    dtypes: dict[str, str] = {}
    """Compute dtype (torch's name) of each parameter whose dtype is not `precision`."""
    buffers: dict[str, list[Count]] | None = None
    """Shape of every persistent buffer, by name; None in checkpoints of early versions."""
    buffer_owners: dict[str, list[Count]] = {}
    """Buffers that differed between ranks: for each rank, the rank that wrote its values."""
    tied: dict[str, str] = {}
    """Other names of tied parameters -> the name under which they are stored."""
    frozen: list[str]
    """Parameters without optimizer states."""
    excluded: list[str] = []
    """Frozen parameters left out of the checkpoint (exclude_frozen_parameters=True)."""
    latest: bool = True
    """Whether a resume may start from it; False with save_latest=False."""
    number: int = 0
    """Counts the checkpoints of a folder in order of completion: the highest is the newest, whatever its step."""
    saved_wall_s: float = 0.0
    files: dict[FileName, FileRecord] = {}
    """Every other file of the checkpoint, by name; empty in checkpoints of early versions."""

    @model_validator(mode="after")
    def _check_owners(self) -> Self:
        for name, owners in self.buffer_owners.items():
            if len(owners) != self.world_size or owners[0] != 0 or max(owners) >= self.world_size:
                raise ValueError(f"buffer_owners.{name} does not fit {self.world_size} ranks")
        return self

    @property
    def weights_only(self) -> bool:
        """Saved by an engine that only evaluates: there is no training to go on with."""
        return self.optimizer == "none"

    def with_plain_names(self) -> Self:
        """A copy with the names of the uncompiled model; early versions wrote names with torch.compile's prefix."""
        return self.model_copy(
            update={
                "shapes": plain_names(self.shapes),
                "dtypes": plain_names(self.dtypes),
                "buffers": None if self.buffers is None else plain_names(self.buffers),
                "buffer_owners": plain_names(self.buffer_owners),
                "tied": {plain_name(name): plain_name(known) for name, known in self.tied.items()},
                "frozen": list(map(plain_name, self.frozen)),
            }
        )

    def sealed(self) -> bytes:
        """The content of manifest.json, including its own digest."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, _DIGEST: _digest(body)}, indent=1).encode() + b"\n"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises CheckpointError if there is none that this version reads,
    DamagedCheckpoint if it was changed."""
    try:
        regular_size(path, MANIFEST)
        body = json.loads((path / MANIFEST).read_bytes())
        digest = body.pop(_DIGEST, None)
        manifest = Manifest.model_validate(body)
    except FileNotFoundError:
        raise CheckpointError(_absence(path)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: {where}: {first['msg']}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error.strerror or error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.format}, this version reads {FORMAT}")
    if (digest is None and manifest.files) or (digest is not None and digest != _digest(body)):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: its digest is not that of its content")
    return manifest.with_plain_names()


def _absence(path: Path) -> str:
    """Why there is no manifest, with the checkpoints that stand beside `path`."""
    if path.is_dir():
        return f"{path} is not a complete checkpoint: it has no {MANIFEST}"
    beside = sorted((one.parent for one in path.parent.glob(f"[!.]*/{MANIFEST}")), key=lambda one: one.stat().st_mtime)
    names = ", ".join(one.name for one in beside[-5:])
    return f"{path} does not exist" + (f"; the newest checkpoints in {path.parent} are {names}" if names else "")


def regular_size(path: Path, name: str) -> int:
    """Size in bytes of a regular file of the checkpoint at `path`. Raises FileNotFoundError, or CheckpointError for
    anything else, such as a pipe, on which a read would block."""
    found = (path / name).stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"checkpoint {path} is damaged or was changed: {name} is not a regular file")
    return found.st_size


def record_of(path: Path) -> FileRecord:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(nbytes=file.tell(), sha256=digest)


def file_problem(path: Path, name: str, written: FileRecord) -> str:
    """How a file of the checkpoint at `path` differs from its record; empty if it does not."""
    file = path / name
    try:
        nbytes = regular_size(path, name)
        if nbytes != written.nbytes:
            return f"{name} has {nbytes:,} bytes, expected {written.nbytes:,}"
        if record_of(file).sha256 != written.sha256:
            return f"{name} was changed (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except CheckpointError:
        return f"{name} is not a regular file"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return ""


def verify(
    path: Path,
    manifest: Manifest,
    part: int = 0,
    parts: int = 1,
    on_file: Callable[[str, FileRecord], None] = lambda name, record: None,
) -> None:
    """Check files against their records: all of them, or share number `part` of `parts`, split by size. on_file(name,
    record): called before each file is read.

    Raises DamagedCheckpoint, naming the first file that differs.
    """
    loads = [0] * parts
    for name, written in sorted(manifest.files.items(), key=lambda item: (-item[1].nbytes, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += written.nbytes
        if owner != part:
            continue
        on_file(name, written)
        if wrong := file_problem(path, name, written):
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {wrong}")


def root_cause(error: BaseException) -> str:
    """The first line of the original error, unwrapped from torch's CheckpointException of all ranks' tracebacks."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
