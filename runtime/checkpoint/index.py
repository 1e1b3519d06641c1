"""Where a checkpoint's tensors are: tensors.json.   (torch-free)

A checkpoint may come from anybody, so nothing of this file is believed: `read_index` checks names, sizes and places
against the files that are there before anything is allocated or opened. Checkpoints of earlier versions have only
torch's own description of them, a pickle: see legacy.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.checkpoint.manifest import CheckpointError, Manifest, regular_size
from runtime.models.names import plain_names

INDEX = "tensors.json"
ITEM_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
"""Bytes per element of the dtypes that a checkpoint may hold, by torch's name."""
_DATA_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_Count = Annotated[int, Field(ge=0, strict=True)]


class StoredPart(NamedTuple):
    """Elements [start, start + numel) of a tensor: `nbytes` bytes of `file` from `offset` on."""

    start: _Count
    numel: _Count
    file: str
    offset: _Count
    nbytes: _Count


class StoredTensor(BaseModel):
    """One tensor, flattened; its parts in order."""

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
        return self.model_dump_json().encode() + b"\n"


Row = tuple[str, str, int, int, int, str, int, int]
"""What a rank says of a part that it has written: name, dtype, numel of the whole tensor, and a StoredPart's fields."""


def index_of(rows: Iterable[Row]) -> TensorIndex:
    """The index of what all ranks have written."""
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


def read_index(path: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint at `path`, by name. Raises CheckpointError where its description is missing, is
    none, or does not fit the files."""
    try:
        return _read_index(path, manifest)
    except FileNotFoundError as error:
        raise _broken(path, f"it has no {Path(error.filename).name}") from None


def _read_index(path: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    if (path / INDEX).exists():
        regular_size(path, INDEX)
        try:
            index = TensorIndex.model_validate_json((path / INDEX).read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"][:4])
            raise CheckpointError(f"{path / INDEX} is damaged: {where or 'the file'}: {first['msg']}") from None
        except OSError as error:
            raise CheckpointError(f"{path / INDEX} cannot be read: {error.strerror or error}") from None
    else:
        from runtime.checkpoint.legacy import read_pickled_index

        index = read_pickled_index(path)
    _check(path, manifest, index.tensors)
    return plain_names(index.tensors)


def _check(path: Path, manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    """Every part is a place of its own in a data file that is long enough for it; together they are the tensor."""
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise _broken(path, f"{name} is of dtype {tensor.dtype!r}")
        end = 0
        for part in tensor.parts:
            if part.start != end:
                break
            end += part.numel
            if part.nbytes < part.numel * ITEM_BYTES[tensor.dtype]:
                raise _broken(path, f"{name}: {part.nbytes:,} bytes are too few for {part.numel:,} elements")
            places[part.file].append((part.offset, part.offset + part.nbytes, name))
        if end != tensor.numel or (tensor.parts and tensor.parts[-1].start + tensor.parts[-1].numel != end):
            raise _broken(path, f"it lacks parts of {name}, or has some twice")
    for file, spans in sorted(places.items()):
        if not _DATA_FILE.fullmatch(file) or (manifest.files and file not in manifest.files):
            raise _broken(path, f"{file!r} is none of its data files")
        size, taken = regular_size(path, file), 0
        for start, end, name in sorted(spans):
            if start < taken:
                raise _broken(path, f"{name} is at a place of {file} that another tensor has")
            taken = end
        if taken > size:
            raise _broken(path, f"{file} has {size:,} bytes, expected {taken:,}")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged or was changed: {why}")
