"""Slices of flattened tensors: what a rank reads into, and what it writes.   (torch-free)"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.tensors import ITEM_BYTES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A slice to read into: `tensor` (numel,) holds elements [start, start + numel) of a flattened tensor of `total`
    elements."""

    tensor: torch.Tensor
    start: int
    total: int

    @classmethod
    def full(cls, tensor: torch.Tensor) -> Piece:
        """The piece that covers all of `tensor`, flattened (a copy if it is not contiguous)."""
        flat = tensor.detach().reshape(-1)
        return cls(flat, 0, flat.numel())


@dataclass(frozen=True)
class Part:
    """A slice to write: elements [start, start + numel) of the flattened tensor `name`, which has `total` elements."""

    name: str
    start: int
    numel: int
    total: int
    dtype: str
    """torch's name of it."""

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str, start: int, numel: int, total: int) -> Part:
        """A part with the dtype of `tensor`. Raises CheckpointError for dtypes that a checkpoint can't hold."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES:
            raise CheckpointError(f"{name} has the dtype {dtype}, which a checkpoint cannot hold")
        return cls(name, start, numel, total, dtype)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize

    def split(self, most: int) -> list[Part]:
        """Consecutive parts of at most `most` elements each."""
        return [
            replace(self, start=self.start + at, numel=min(most, self.numel - at)) for at in range(0, self.numel, most)
        ]
