"""Small values between ranks, as JSON: settings, problems, commands, random number states.

torch's own object collectives (all_gather_object, broadcast_object_list, ...) load a pickle that another process has
sent, and a pickle is a program: a process that takes a rank's place in a Gloo group would run code as the run's owner.
Nothing in runtime/ calls them. Values that arrive here are only data: plain values, and tensors of known dtypes.

They are signed: see [Note: signed values] in runtime/wire/signature.py.
"""

from __future__ import annotations

import base64
import json
import weakref
from typing import Any

import torch
import torch.distributed as dist

from runtime.wire.signature import checked, signed

LARGEST_BYTES = 2**28
"""Largest value in bytes; a larger size was not sent by a rank."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}


class ObjectError(RuntimeError):
    """A value from another rank is malformed."""


def pack(value: Any) -> bytes:
    """Encode None, bool, int, float, str, bytes, tensors, and lists, tuples and dicts of them. Raises TypeError for
    other types."""
    return json.dumps(_to_json(value), separators=(",", ":")).encode()


def unpack(packed: bytes) -> Any:
    """Decode what `pack` encoded, with tensors on the CPU. Raises ObjectError if it is malformed."""
    try:
        return _from_json(json.loads(packed))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # torch's for a shape, Python's for the depth
        raise ObjectError(f"a rank has sent a malformed value: {type(error).__name__}") from None


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. `group` is a Gloo group."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    place = _next_place(group)
    own = _tensor(signed(pack(value), place, rank))
    sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([own.numel()], device="cpu"), group=group)
    lengths = [_length(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
    padded[: own.numel()] = own
    arrived = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(arrived, padded, group=group)
    return [
        unpack(checked(_bytes(tensor[:length]), place, sender))
        for sender, (tensor, length) in enumerate(zip(arrived, lengths, strict=True))
    ]


def broadcast(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's `value` on every rank; the values of other ranks are ignored. `group` is a Gloo group of the world."""
    first = dist.get_rank(group) == 0
    place = _next_place(group)
    content = _tensor(signed(pack(value), place, 0)) if first else torch.empty(0, dtype=torch.uint8, device="cpu")
    size = torch.tensor([content.numel()], device="cpu")
    dist.broadcast(size, 0, group=group)
    if first:
        dist.broadcast(content, 0, group=group)
        return value
    content = torch.empty(_length(size), dtype=torch.uint8, device="cpu")
    dist.broadcast(content, 0, group=group)
    return unpack(checked(_bytes(content), place, 0))


_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""Process group -> number of exchanges so far."""


def _next_place(group: dist.ProcessGroup | None) -> str:
    """Name of the next exchange: the same on all ranks, because they exchange in one order."""
    world = group if group is not None else dist.group.WORLD
    assert world is not None
    number = _exchanges[world] = _exchanges.get(world, 0) + 1
    return f"{world.group_name}/{dist.get_world_size(world)}/{number}"


# ---- as JSON --------------------------------------------------------------------------------------------------------
def _to_json(value: Any) -> Any:
    """`value` as JSON. A type that JSON lacks becomes an object with one key, the type's name."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_to_json(item) for item in value]
        case tuple():
            return {"tuple": [_to_json(item) for item in value]}
        case dict():
            return {"dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
        case bytes():
            return {"bytes": base64.b64encode(value).decode()}
        case torch.Tensor():
            flat = value.detach().cpu().contiguous().view(-1)
            name = str(value.dtype).removeprefix("torch.")
            if name in _DTYPES:
                content = base64.b64encode(_bytes(flat.view(torch.uint8))).decode()
                return {"tensor": [name, list(value.shape), content]}
    raise TypeError(f"a {type(value).__name__} can't be sent to other ranks")


def _from_json(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_from_json(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "tuple" and isinstance(content, list):
        return tuple(_from_json(item) for item in content)
    if kind == "dict" and isinstance(content, list):
        return {_from_json(key): _from_json(item) for key, item in content}
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "tensor":
        name, shape, encoded = content
        content = bytearray(base64.b64decode(encoded, validate=True))
        flat = (
            torch.frombuffer(content, dtype=_DTYPES[name])
            if content
            else torch.empty(0, dtype=_DTYPES[name], device="cpu")
        )
        return flat.view(shape)
    raise ValueError(kind)


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _length(size: torch.Tensor) -> int:
    length = int(size)
    if not 0 < length <= LARGEST_BYTES:
        raise ObjectError(f"a rank has sent a value of {length:,} bytes: expected 1 to {LARGEST_BYTES:,}")
    return length
