"""Whole tensors of a checkpoint, one at a time, in one process: without a process group, and without the model."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from runtime.checkpoint.manifest import CheckpointError, Manifest, read_manifest, root_cause
from runtime.checkpoint.parts import Piece
from runtime.checkpoint.shards import LoadPlanner
from runtime.precision import DTYPES


@dataclass(frozen=True)
class Stored:
    """A parameter or a persistent buffer in a checkpoint."""

    key: str
    """As torch.distributed.checkpoint has it: "param.NAME" or "buffer.NAME"."""
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In which the run computed with it; a parameter's master is stored in fp32."""

    @property
    def is_parameter(self) -> bool:
        return self.key.startswith("param.")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class CheckpointReader:
    """The parameters and buffers of the checkpoint at `path`; optimizer states are not looked at.

    Raises CheckpointError where it is none, or where files are missing or shorter than what they are to hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._reader = FileSystemReader(path)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            self._check_files()
        except FileNotFoundError as error:
            raise self._broken(f"it has no {Path(error.filename).name}") from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle raises whatever its bytes say
            raise self._broken(root_cause(error)) from error
        self.tensors = [*self._parameters(self.manifest), *self._buffers(self.manifest)]

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.path} is damaged or incomplete ({why}): take another one; a run that goes on deletes "
            "its old ones (zerotop.checkpoint.keep)"
        )

    def _check_files(self) -> None:
        """Before anything is written: that every file is there, and as long as the metadata want it."""
        ends: dict[str, int] = defaultdict(int)
        for part in self._metadata.storage_data.values():
            ends[part.relative_path] = max(ends[part.relative_path], part.offset + part.length)
        for name, end in sorted(ends.items()):
            size = (self.path / name).stat().st_size
            if size < end:
                raise self._broken(f"{name} has {size:,} bytes, expected {end:,}")

    def _parameters(self, manifest: Manifest) -> list[Stored]:
        return [
            Stored(f"param.{name}", name, tuple(shape), self._computed_in(name, manifest))
            for name, shape in manifest.shapes.items()
        ]

    def _computed_in(self, name: str, manifest: Manifest) -> torch.dtype:
        if name in manifest.dtypes:
            named = getattr(torch, manifest.dtypes[name], None)
            if not isinstance(named, torch.dtype):
                raise self._broken(f"its manifest says that {name} is of dtype {manifest.dtypes[name]!r}")
            return named
        if manifest.precision not in DTYPES:
            raise self._broken(f"its manifest has precision {manifest.precision!r}")
        return DTYPES[manifest.precision]

    def _buffers(self, manifest: Manifest) -> list[Stored]:
        stored = [key for key in self._metadata.state_dict_metadata if key.startswith("buffer.")]
        if manifest.buffers is None and stored:
            raise CheckpointError(
                f"checkpoint {self.path} was written by an earlier version, which did not keep the shapes of buffers: "
                "load it and save it again"
            )
        return [
            Stored(f"buffer.{name}", name, tuple(shape), self._tensor(f"buffer.{name}").properties.dtype)
            for name, shape in (manifest.buffers or {}).items()
        ]

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise self._broken(f"it lacks {key}")
        return found

    def read(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`, rounded to nearest as torch does. Beside it, memory holds one rank's slice of it
        as stored."""
        whole = torch.empty(stored.numel, dtype=dtype)
        if stored.numel == 0:
            return whole.view(stored.shape)
        if tuple(self._tensor(stored.key).size) != (stored.numel,):
            raise self._broken(f"{stored.key} has {list(self._tensor(stored.key).size)} elements, not {stored.numel}")
        planner = LoadPlanner({stored.key: Piece(whole, 0, stored.numel)})
        planner.set_up_planner({}, self._metadata, is_coordinator=True)
        plan = planner.create_local_plan()
        if sum(item.lengths.numel() for item in plan.items) != stored.numel:
            raise self._broken(f"it lacks parts of {stored.key}")
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:  # torch.load raises whatever damaged bytes make it
            raise self._broken(f"{stored.key}: {root_cause(error)}") from error
        return whole.view(stored.shape)
