"""Reading tensors.json, the index of a checkpoint's tensors.   (torch-free)

A checkpoint may come from anybody, so `read_index` checks names, sizes and offsets against the actual files before
anything is allocated or opened. Checkpoints of earlier versions have only torch's own index, a pickle: see legacy.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from runtime.checkpoint.format.legacy import read_pickled_index
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, regular_size
from runtime.checkpoint.format.tensors import INDEX, ITEM_BYTES, StoredTensor, TensorIndex
from runtime.models.names import plain_names

_DATA_FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")


def read_index(path: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensors of the checkpoint at `path`, by key. Raises CheckpointError if the index is missing, malformed, or
    does not fit the files."""
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
        index = read_pickled_index(path)
    _check(path, manifest, index.tensors)
    return plain_names(index.tensors)


def _check(path: Path, manifest: Manifest, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that parts lie within their data files without overlap, and that the parts of a tensor cover it exactly."""
    places: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.dtype not in ITEM_BYTES:
            raise _broken(path, f"{name} has the unknown dtype {tensor.dtype!r}")
        end = 0
        for part in tensor.parts:
            if part.start != end:
                break
            end += part.numel
            if part.nbytes < part.numel * ITEM_BYTES[tensor.dtype]:
                raise _broken(path, f"{name}: {part.nbytes:,} bytes are too few for {part.numel:,} elements")
            places[part.file].append((part.offset, part.offset + part.nbytes, name))
        if end != tensor.numel or (tensor.parts and tensor.parts[-1].start + tensor.parts[-1].numel != end):
            raise _broken(path, f"the parts of {name} have gaps or overlap")
    for file, spans in sorted(places.items()):
        if not _DATA_FILE.fullmatch(file) or (manifest.files and file not in manifest.files):
            raise _broken(path, f"{file!r} is not one of its data files")
        size, taken = regular_size(path, file), 0
        for start, end, name in sorted(spans):
            if start < taken:
                raise _broken(path, f"{name} overlaps another tensor in {file}")
            taken = end
        if taken > size:
            raise _broken(path, f"{file} has {size:,} bytes, expected {taken:,}")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged or was changed: {why}")
