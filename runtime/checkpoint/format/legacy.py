"""Reading .metadata, torch's pickled index, which checkpoints of earlier versions have instead of tensors.json.

Unpickling runs no code: the few classes of torch.distributed.checkpoint that the index consists of become plain
records, any other class is refused, and the result is checked like tensors.json.
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
    """Stands for an object of a known class: its constructor arguments and attributes, without behaviour."""

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
        """The attribute `name`."""
        return self.attributes[name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a record that stands for a torch.Size."""
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
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of a checkpoint")


def read_pickled_index(path: Path) -> TensorIndex:
    """The index in .metadata of the checkpoint at `path`. Raises CheckpointError if it is missing or malformed."""
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
    """Refuse huge memo indices, for which the unpickler would allocate memory however small the file is."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "LONG_BINPUT") and (not isinstance(argument, int) or argument > len(content)):
            raise pickle.UnpicklingError("it has a memo index beyond its own length")


def _tensor(name: str, tensor: _Record, places: Mapping[tuple[Any, Any], Mapping[str, Any]]) -> StoredTensor:
    (numel,) = tensor.get("size").sizes
    parts = []
    for chunk in tensor.get("chunks"):
        (start,), (count,) = chunk.get("offsets").sizes, chunk.get("sizes").sizes
        place = places[name, start]
        if place.get("transform_descriptors"):
            raise pickle.UnpicklingError(f"{name} is compressed or encrypted, which zerotop never writes")
        parts.append(StoredPart(start, count, place["relative_path"], place["offset"], place["length"]))
    dtype = tensor.get("properties").arguments[0]
    return StoredTensor(dtype=str(dtype), numel=numel, parts=sorted(parts))
