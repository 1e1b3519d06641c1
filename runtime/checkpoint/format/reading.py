"""Whole tensors of a checkpoint, one at a time, in one process: without a process group, and without the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.checkpoint.capture import Piece
from runtime.checkpoint.format.index import read_index
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, read_manifest
from runtime.checkpoint.format.stored import read_pieces
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.state.precision import DTYPES


@dataclass(frozen=True)
class Stored:
    """A parameter or a persistent buffer in a checkpoint."""

    key: str
    """In tensors.json: "param.NAME" or "buffer.NAME"."""
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
        self._index = read_index(path, self.manifest)
        self.tensors = [*self._parameters(self.manifest), *self._buffers(self.manifest)]

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {self.path} is damaged or incomplete ({why}): take another one; a run that goes on deletes "
            "its old ones (zerotop.checkpoint.keep)"
        )

    def _parameters(self, manifest: Manifest) -> list[Stored]:
        excluded = set(manifest.excluded)
        return [
            Stored(f"param.{name}", name, tuple(shape), self._computed_in(name, manifest))
            for name, shape in manifest.shapes.items()
            if name not in excluded
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
        stored = [key for key in self._index if key.startswith("buffer.")]
        if manifest.buffers is None and stored:
            raise CheckpointError(
                f"checkpoint {self.path} was written by an earlier version, which did not keep the shapes of buffers: "
                "load it and save it again"
            )
        return [
            Stored(f"buffer.{name}", name, tuple(shape), getattr(torch, self._tensor(f"buffer.{name}").dtype))
            for name, shape in (manifest.buffers or {}).items()
        ]

    def _tensor(self, key: str) -> StoredTensor:
        if key not in self._index:
            raise self._broken(f"it lacks {key}")
        return self._index[key]

    def read(self, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`, rounded to nearest as torch does. Beside it, memory holds one rank's slice of it
        as stored."""
        if (found := self._tensor(stored.key).numel) != stored.numel:
            raise self._broken(f"{stored.key} has {found:,} elements, not {stored.numel:,}")
        whole = torch.empty(stored.numel, dtype=dtype)
        read_pieces(self.path, self._index, {stored.key: Piece(whole, 0, stored.numel)})
        return whole.view(stored.shape)
