"""The two pickles of a checkpoint that torch's tools read, written opcode by opcode.   (torch-free)

A writer process must not import torch, which takes seconds and hundreds of megabytes, and pickle.dumps needs the
classes that it names. tests/unit/checkpoint/test_pickles.py reads both with torch and torch.distributed.checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping

from runtime.checkpoint.format.tensors import StoredPart, StoredTensor

_PROTOCOL = pickle.PROTO + b"\x02"
_METADATA = "torch.distributed.checkpoint.metadata"


def tensor_pickle(dtype: str, numel: int, nbytes: int) -> bytes:
    """data.pkl of a file by torch.save, for a 1-D tensor on the CPU whose storage is the file's record data/0."""
    storage = _tuple(_plain("storage"), _global("torch.storage", "UntypedStorage"), *map(_plain, ("0", "cpu", nbytes)))
    hooks = _call("collections", "OrderedDict")
    size, stride = _plain((numel,)), _plain((1,))
    arguments = (storage + pickle.BINPERSID, _plain(0), size, stride, _plain(False), hooks, _global("torch", dtype))
    return _PROTOCOL + _call("torch._utils", "_rebuild_tensor_v3", *arguments) + pickle.STOP


def metadata_pickle(tensors: Mapping[str, StoredTensor]) -> bytes:
    """.metadata, the index that torch.distributed.checkpoint reads: its `Metadata` of `tensors`, by key."""
    places = ((name, part) for name, tensor in tensors.items() for part in tensor.parts)
    metadata = _object(
        _METADATA,
        "Metadata",
        state_dict_metadata=_dict((_plain(name), _tensor(tensor)) for name, tensor in tensors.items()),
        planner_data=_plain(None),
        storage_data=_dict((_index(name, part), _storage(part)) for name, part in places),
        storage_meta=_plain(None),
        version=_plain(None),
    )
    return _PROTOCOL + metadata + pickle.STOP


def _tensor(tensor: StoredTensor) -> bytes:
    properties = _tuple(
        _global("torch", tensor.dtype),
        _call("torch.serialization", "_get_layout", _plain("torch.strided")),
        _plain(False),  # requires_grad
        _call(_METADATA, "_MEM_FORMAT_ENCODING", _plain(0)),  # contiguous
        _plain(False),  # pin_memory
    )
    return _object(
        _METADATA,
        "TensorStorageMetadata",
        properties=_made(_METADATA, "TensorProperties") + properties + pickle.BUILD,
        size=_size(tensor.numel),
        chunks=_list(
            _object(_METADATA, "ChunkStorageMetadata", offsets=_size(part.start), sizes=_size(part.numel))
            for part in tensor.parts
        ),
    )


def _index(name: str, part: StoredPart) -> bytes:
    return _object(_METADATA, "MetadataIndex", fqn=_plain(name), offset=_size(part.start), index=_plain(None))


def _storage(part: StoredPart) -> bytes:
    return _object(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        relative_path=_plain(part.file),
        offset=_plain(part.offset),
        length=_plain(part.nbytes),
        transform_descriptors=_plain(None),
    )


def _size(number: int) -> bytes:
    return _call("torch", "Size", _plain((number,)))


# ---- opcodes of protocol 2 ------------------------------------------------------------------------------------------
def _plain(value: object) -> bytes:
    """A value of Python's own types."""
    return pickle.dumps(value, 2)[len(_PROTOCOL) : -len(pickle.STOP)]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _list(items: Iterable[bytes]) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS


def _dict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(key + value for key, value in items) + pickle.SETITEMS


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return _global(module, name) + _tuple(*arguments) + pickle.REDUCE


def _made(module: str, name: str) -> bytes:
    """An object without attributes, made without calling its class's __init__."""
    return _global(module, name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ


def _object(module: str, name: str, **attributes: bytes) -> bytes:
    return _made(module, name) + _dict((_plain(key), value) for key, value in attributes.items()) + pickle.BUILD
