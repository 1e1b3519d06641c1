"""The tensors of an export: what each is called, how large it is, and how its values are read when its file is
written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.reader import CheckpointReader, CheckpointTensor
from runtime.state.precision import DTYPES

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype that is written."""
    original_dtype: torch.dtype
    """The dtype in which the run computed."""
    read: Callable[[], torch.Tensor]
    """Reads the values in `dtype`."""
    is_parameter: bool = True
    """Whether it is a parameter and not a buffer."""
    origin: str = ""
    """Its name where it is read from."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Size as written."""
        return self.numel * self.dtype.itemsize

    def checked(self) -> torch.Tensor:
        """Its values. Raises CheckpointError if they do not fit the dtype."""
        whole = self.read()
        # Buffers may hold infinite masks; infinite parameters mean overflow.
        if self.dtype == torch.float16 != self.original_dtype and self.is_parameter and whole.isinf().any():
            raise CheckpointError(
                f"{self.name} has values beyond 65,504, fp16's largest: export with --dtype "
                f"{_WORDS.get(self.original_dtype, 'fp32')}"
            )
        return whole


def dtype_of(asked: str, computed: torch.dtype) -> torch.dtype:
    """What a tensor is written in. asked: --dtype; "auto" keeps the dtype in which the run computed."""
    return DTYPES[asked] if asked != "auto" and computed.is_floating_point else computed


def from_checkpoint(reader: CheckpointReader, stored: CheckpointTensor, name: str, asked: str) -> ExportTensor:
    """A tensor of the checkpoint under the name `name`."""
    dtype = dtype_of(asked, stored.dtype)
    return ExportTensor(
        name, stored.shape, dtype, stored.dtype, lambda: reader.read(stored, dtype), stored.is_parameter, stored.name
    )
