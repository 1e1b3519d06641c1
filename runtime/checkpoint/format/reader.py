"""Reading full tensors of a checkpoint one at a time, in one process, without a process group or the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.checkpoint.format.index import read_index
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, read_manifest
from runtime.checkpoint.format.shard_reader import read_pieces
from runtime.checkpoint.format.slices import Piece
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.state.precision import DTYPES


@dataclass(frozen=True)
class CheckpointTensor:
    """A parameter or a persistent buffer in a checkpoint."""

    key: str
    """Key in tensors.json: "param.NAME" or "buffer.NAME"."""
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype in which the run computed; a parameter's master weights are stored in fp32."""

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter and not a buffer."""
        return self.key.startswith("param.")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class CheckpointReader:
    """Reads the parameters and buffers of the checkpoint at `path`, but no optimizer states.

    Raises CheckpointError if it is not a checkpoint, or files are missing or too short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._index = read_index(path, self.manifest)
        self.tensors = [*self._parameters(self.manifest), *self._buffers(self.manifest)]

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.path} is damaged or incomplete ({why}): use another one; a run in progress deletes "
            "its old checkpoints (zerotop.checkpoint.keep)"
        )

    def _parameters(self, manifest: Manifest) -> list[CheckpointTensor]:
        excluded = set(manifest.excluded)
        return [
            CheckpointTensor(f"param.{name}", name, tuple(shape), self._computed_in(name, manifest))
            for name, shape in manifest.shapes.items()
            if name not in excluded
        ]

    def _computed_in(self, name: str, manifest: Manifest) -> torch.dtype:
        if name in manifest.dtypes:
            named = getattr(torch, manifest.dtypes[name], None)
            if not isinstance(named, torch.dtype):
                raise self._broken(f"its manifest has the unknown dtype {manifest.dtypes[name]!r} for {name}")
            return named
        if manifest.precision not in DTYPES:
            raise self._broken(f"its manifest has the unknown precision {manifest.precision!r}")
        return DTYPES[manifest.precision]

    def _buffers(self, manifest: Manifest) -> list[CheckpointTensor]:
        stored = [key for key in self._index if key.startswith("buffer.")]
        if manifest.buffers is None and stored:
            raise CheckpointError(
                f"checkpoint {self.path} was written by an earlier version, which did not store the shapes of buffers: "
                "load it into a run and save it again"
            )
        return [
            CheckpointTensor(f"buffer.{name}", name, tuple(shape), getattr(torch, self._tensor(f"buffer.{name}").dtype))
            for name, shape in (manifest.buffers or {}).items()
        ]

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self._index:
            raise self._broken(f"it lacks {key}")
        return self._index[key]

    def read(self, stored: CheckpointTensor, dtype: torch.dtype) -> torch.Tensor:
        """(shape,): the full tensor, converted to `dtype`. Needs additional memory for one rank's slice as stored."""
        if (found := self._tensor(stored.key).numel) != stored.numel:
            raise self._broken(f"{stored.key} has {found:,} elements, not {stored.numel:,}")
        return self.read_slice(stored, 0, stored.numel, dtype).view(stored.shape)

    def read_slice(
        self, stored: CheckpointTensor, start: int, stop: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """(stop - start,): elements [start, stop) of the flattened tensor, converted to `dtype`."""
        piece = torch.empty(stop - start, dtype=dtype, device="cpu")
        read_pieces(self.path, self._index, {stored.key: Piece(piece, start, stored.numel)})
        return piece
