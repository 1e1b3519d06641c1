"""What a checkpoint says of itself before its tensors are opened: manifest.json.   (torch-free)

It also tells a sound checkpoint from a damaged one: it holds the size and SHA-256 of every other file, and its own.
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
"""Folder in a checkpoint: what is known of the model beside its tensors (config.json, the tokenizer)."""
FORMAT = 1
_DIGEST = "digest"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; the message says which and why."""


class Misnamed(CheckpointError, ValueError):
    """Nothing can be written there. DeepSpeed raises ValueError for it."""


class Damaged(CheckpointError):
    """A checkpoint is not what was written: cut short, changed, or a file is missing."""


@dataclass(frozen=True)
class Wanted:
    """What to load of a checkpoint."""

    strict: bool = True
    """The model and the checkpoint must have the same parameters and buffers."""
    module: bool = True
    """Parameters and buffers."""
    optimizer: bool = True
    scheduler: bool = True
    progress: bool = True
    """Step counts, loss scale, random numbers."""


EVERYTHING = Wanted()


def _inside(name: str) -> str:
    """A checkpoint may come from anybody: its files are in its own folder, or one below."""
    if not re.fullmatch(r"(model/)?[A-Za-z0-9_.-]+", name) or name.rpartition("/")[2] in (".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in a checkpoint")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Count = Annotated[int, Field(ge=0)]


class FileRecord(BaseModel):
    """One file of a checkpoint as it was written."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    nbytes: Count
    sha256: str


class Manifest(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    step: Count
    """Optimizer steps taken, skipped ones included."""
    optimizer_step: Count
    """Updates taken: Adam's bias correction counts these. 0: there are no optimizer states yet."""
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
    """Of every parameter, trained or frozen."""
    dtypes: dict[str, str] = {}
    """Of the parameters that compute in another dtype than `precision`: torch's name of it."""
    buffers: dict[str, list[Count]] | None = None
    """Shape of every persistent buffer; None in those of early versions."""
    buffer_owners: dict[str, list[Count]] = {}
    """Of buffers that the ranks held differently: for each rank, the one that has written what it held."""
    tied: dict[str, str] = {}
    """Other names of parameters that have several -> the name that they have here."""
    frozen: list[str]
    """Parameters without optimizer states."""
    excluded: list[str] = []
    """Parameters of the model that the checkpoint does not hold: frozen ones, where the script wanted it so."""
    latest: bool = True
    """False: a script keeps it beside those that a resume begins from (save_latest=False)."""
    number: int = 0
    """Counts the checkpoints of a folder as they were completed: the highest is the newest, whatever its step is."""
    saved_wall_s: float = 0.0
    files: dict[FileName, FileRecord] = {}
    """Every other file of the checkpoint, by name; empty in those of early versions."""

    @model_validator(mode="after")
    def _check_owners(self) -> Self:
        for name, owners in self.buffer_owners.items():
            if len(owners) != self.world_size or owners[0] != 0 or max(owners) >= self.world_size:
                raise ValueError(f"buffer_owners.{name} are not of {self.world_size} ranks")
        return self

    @property
    def weights_only(self) -> bool:
        """Saved by an engine that only evaluates: there is no training to go on with."""
        return self.optimizer == "none"

    def with_plain_names(self) -> Self:
        """With the names that the model has when it is not compiled. (Early versions wrote those of compiled ones.)"""
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
        """The file's content, its own digest in it."""
        body = self.model_dump(mode="json")
        return json.dumps({**body, _DIGEST: _digest(body)}, indent=1).encode() + b"\n"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Raises CheckpointError where there is none that this version can read, Damaged where it was changed."""
    try:
        regular_size(path, MANIFEST)
        body = json.loads((path / MANIFEST).read_bytes())
        digest = body.pop(_DIGEST, None)
        manifest = Manifest.model_validate(body)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise Damaged(f"{path / MANIFEST} is damaged: {where}: {first['msg']}") from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST} is damaged: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error.strerror or error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.format}, this version reads {FORMAT}")
    if (digest is None and manifest.files) or (digest is not None and digest != _digest(body)):
        raise Damaged(f"{path / MANIFEST} is damaged: its digest is not that of its content")
    return manifest.with_plain_names()


def regular_size(path: Path, name: str) -> int:
    """The size in bytes of a file of the checkpoint at `path`. Raises FileNotFoundError, or CheckpointError where it is
    something else, such as a pipe, which reading would wait for."""
    found = (path / name).stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"checkpoint {path} is damaged or was changed: {name} is not a regular file")
    return found.st_size


def record_of(path: Path) -> FileRecord:
    """Size (bytes) and SHA-256 of a file, read from the disk or its cache."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(nbytes=file.tell(), sha256=digest)


def difference(path: Path, name: str, written: FileRecord) -> str:
    """What is wrong with one file of the checkpoint at `path`, in words; empty when nothing is."""
    file = path / name
    try:
        nbytes = regular_size(path, name)
        if nbytes != written.nbytes:
            return f"{name} has {nbytes:,} bytes, {written.nbytes:,} were written"
        if record_of(file).sha256 != written.sha256:
            return f"{name} is not what was written (its SHA-256 differs)"
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
    before: Callable[[str, FileRecord], None] = lambda name, record: None,
) -> None:
    """Compare files with what was written: all of them, or the `part`-th of `parts` ranks' share, split by size.
    before(name, record): called with each file.

    Raises Damaged, naming the first file that differs.
    """
    loads = [0] * parts
    for name, written in sorted(manifest.files.items(), key=lambda item: (-item[1].nbytes, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += written.nbytes
        if owner != part:
            continue
        before(name, written)
        if wrong := difference(path, name, written):
            raise Damaged(f"checkpoint {path} is damaged: {wrong}")


def root_cause(error: BaseException) -> str:
    """torch wraps a rank's error in a CheckpointException with every rank's traceback; people need its last line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]
