"""Slices of flattened tensors: what a rank reads into, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def split(self, most: int) -> list[Part]:
        """Consecutive parts of at most `most` elements each."""
        return [
            replace(self, start=self.start + at, numel=min(most, self.numel - at)) for at in range(0, self.numel, most)
        ]
