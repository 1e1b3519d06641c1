"""Persistent buffers in a checkpoint. Rank 0 writes all of its own; another rank writes those that differ from every
lower rank's.

[Note: whose buffers]
At the world size that saved, every rank gets its own buffers back, bit for bit (batch norm statistics differ by rank).
At another world size, and in an export, all buffers are rank 0's.
"""

from __future__ import annotations

import hashlib

import torch

from runtime.checkpoint.format.manifest import Manifest
from runtime.models.names import plain_name
from runtime.state.train_state import TrainState

BufferOwners = dict[str, list[int]]
"""Name of a buffer that differs between ranks -> for each rank, the lowest rank that holds the same values."""
REPLICATED: BufferOwners = {}
"""No buffer differs between ranks."""


def buffers_of(state: TrainState) -> dict[str, torch.Tensor]:
    """All persistent buffers by name; a buffer that several modules share appears once, under its first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in state.module.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), (plain_name(f"{path}.{name}" if path else name), buffer))
    return dict(found.values())


def buffer_key(name: str, owner: int = 0) -> str:
    """Key in tensors.json of a buffer as rank `owner` wrote it."""
    return f"buffer.{name}" if owner == 0 else f"rank-{owner}.buffer.{name}"


def buffer_key_for_rank(name: str, manifest: Manifest, rank: int, world_size: int) -> str:
    """Key in tensors.json of the buffer that `rank` reads. See [Note: whose buffers]."""
    owners = manifest.buffer_owners.get(name)
    return buffer_key(name, owners[rank] if owners is not None and world_size == manifest.world_size else 0)


def find_buffer_owners(state: TrainState) -> BufferOwners:
    """Find the buffers that differ between ranks, by digest. Collective."""
    comm, buffers = state.comm, buffers_of(state)
    if comm.world_size == 1 or not buffers:
        return {}
    gathered = comm.gather_objects([_digest(buffer) for buffer in buffers.values()])
    owners = {
        name: [digests.index(digest) for digest in digests] for name, *digests in zip(buffers, *gathered, strict=True)
    }
    return {name: found for name, found in owners.items() if any(found)}


def own_buffers(state: TrainState, owners: BufferOwners | None) -> dict[str, torch.Tensor]:
    """Buffers that this rank writes itself, by key; none on rank 0, whose buffers are in `replicated_tensors`. owners
    None: an upper bound, for sizing memory before it is known which buffers differ."""
    rank = state.comm.rank
    if rank == 0:
        return {}
    return {
        buffer_key(name, rank): buffer
        for name, buffer in buffers_of(state).items()
        if owners is None or (name in owners and owners[name][rank] == rank)
    }


def _digest(buffer: torch.Tensor) -> str:
    content = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()
