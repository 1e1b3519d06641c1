"""The schema of tensors.json, a checkpoint's index of tensors, and the dtypes it may name.   (torch-free)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

INDEX = "tensors.json"
ITEM_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
"""Bytes per element of the dtypes that a checkpoint may hold, by torch's name."""
_Count = Annotated[int, Field(ge=0, strict=True)]


class StoredPart(NamedTuple):
    """Elements [start, start + numel) of a flattened tensor, stored in `nbytes` bytes of `file` from `offset` on."""

    start: _Count
    numel: _Count
    file: str
    offset: _Count
    nbytes: _Count


class StoredTensor(BaseModel):
    """One flattened tensor; its parts are sorted by `start`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    dtype: str
    numel: _Count
    parts: list[StoredPart]


class TensorIndex(BaseModel):
    """tensors.json: every tensor by name ("param.NAME", "state.STATE.NAME", "buffer.NAME")."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1] = 1
    tensors: dict[str, StoredTensor]

    def encoded(self) -> bytes:
        """The content of tensors.json."""
        return self.model_dump_json().encode() + b"\n"


Row = tuple[str, str, int, int, int, str, int, int]
"""A part that a rank has written: tensor name, dtype, numel of the full tensor, and a StoredPart's fields."""


def index_of(rows: Iterable[Row]) -> TensorIndex:
    """The index of the parts that all ranks have written."""
    parts: dict[str, list[StoredPart]] = defaultdict(list)
    kinds: dict[str, tuple[str, int]] = {}
    for name, dtype, total, start, numel, file, offset, nbytes in rows:
        kinds[name] = dtype, total
        parts[name].append(StoredPart(start, numel, file, offset, nbytes))
    return TensorIndex(
        tensors={
            name: StoredTensor(dtype=dtype, numel=numel, parts=sorted(parts[name]))
            for name, (dtype, numel) in sorted(kinds.items())
        }
    )
