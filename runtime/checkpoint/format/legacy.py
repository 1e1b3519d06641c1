"""The description of tensors in checkpoints of earlier versions: .metadata, torch's pickle of it.

It is never unpickled with what it names: the few classes of torch.distributed.checkpoint that it is made of are read as
plain records, anything else is refused, and what comes out is checked as tensors.json is.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runtime.checkpoint.format.manifest import CheckpointError, regular_size
from runtime.checkpoint.format.tensors import ITEM_BYTES, StoredPart, StoredTensor, TensorIndex

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint."


class _Record:
    """Stands for an object of a known class: what it was made with and its attributes, and no behaviour."""

    arguments: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = {}

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            self.arguments = state
        else:
            self.attributes = dict(state)

    def get(self, name: str) -> Any:
        return self.attributes[name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of a torch.Size."""
        return tuple(self.arguments[0])


class _Dtype(str):
    __slots__ = ()


_KNOWN = {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _Record
        if module == "torch" and name in ITEM_BYTES:
            return _Dtype(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of zerotop does")


def read_pickled_index(path: Path) -> TensorIndex:
    """Raises CheckpointError where there is none, or it is not such a description."""
    regular_size(path, METADATA)
    try:
        content = (path / METADATA).read_bytes()
        _check_memo(content)
        found = _Unpickler(io.BytesIO(content)).load()
        tensors = found.get("state_dict_metadata")
        places = {
            (key.get("fqn"), key.get("offset").sizes[0]): place.attributes
            for key, place in found.get("storage_data").items()
        }
        return TensorIndex(tensors={name: _tensor(name, tensor, places) for name, tensor in tensors.items()})
    except OSError as error:
        raise CheckpointError(f"{path / METADATA} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        raise CheckpointError(f"{path / METADATA} is damaged: {error.errors()[0]['msg']}") from None
    except Exception as error:  # damaged pickles raise whatever their bytes say
        text = str(error).splitlines() or [""]
        raise CheckpointError(f"{path / METADATA} is damaged: {type(error).__name__}: {text[0][:200]}") from None


def _check_memo(content: bytes) -> None:
    """Python makes room for the highest memo entry that a pickle names, however many there are."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and (not isinstance(argument, int) or argument > len(content)):
            raise pickle.UnpicklingError("it names more objects than it has bytes")


def _tensor(name: str, tensor: _Record, places: Mapping[tuple[Any, Any], Mapping[str, Any]]) -> StoredTensor:
    (numel,) = tensor.get("size").sizes
    parts = []
    for chunk in tensor.get("chunks"):
        (start,), (count,) = chunk.get("offsets").sizes, chunk.get("sizes").sizes
        place = places[name, start]
        if place.get("transform_descriptors"):
            raise pickle.UnpicklingError(f"{name} is compressed or encrypted, which no checkpoint of zerotop is")
        parts.append(StoredPart(start, count, place["relative_path"], place["offset"], place["length"]))
    dtype = tensor.get("properties").arguments[0]
    return StoredTensor(dtype=str(dtype), numel=numel, parts=sorted(parts))
