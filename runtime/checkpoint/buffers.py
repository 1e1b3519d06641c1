"""Persistent buffers in a checkpoint: what all ranks hold alike is written once, what differs by each rank that has
something of its own.

[Note: whose buffers]
At the world size that saved, every rank gets its own buffers back, bit for bit (the statistics of batch norm are each
rank's). At another one, and in an export, they are rank 0's.
"""

from __future__ import annotations

import hashlib

import torch

from runtime.checkpoint.format.manifest import Manifest
from runtime.models.names import plain_name
from runtime.state.train_state import TrainState

Owners = dict[str, list[int]]
"""Of buffers that differ between ranks: for each rank, the first one that holds the same."""
ALIKE: Owners = {}
"""All ranks hold all buffers alike."""


def buffers_of(state: TrainState) -> dict[str, torch.Tensor]:
    """Persistent buffers by name; one that several modules share has its first name only, as parameters do."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for path, module in state.module.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(id(buffer), (plain_name(f"{path}.{name}" if path else name), buffer))
    return dict(found.values())


def key_of(name: str, owner: int = 0) -> str:
    """What the buffer of rank `owner` is called in a checkpoint."""
    return f"buffer.{name}" if owner == 0 else f"rank-{owner}.buffer.{name}"


def key_for(name: str, manifest: Manifest, rank: int, world_size: int) -> str:
    """Whose buffer a rank reads. See [Note: whose buffers]."""
    owners = manifest.buffer_owners.get(name)
    return key_of(name, owners[rank] if owners is not None and world_size == manifest.world_size else 0)


def owners_of(state: TrainState) -> Owners:
    """Collective: which buffers differ between the ranks."""
    comm, buffers = state.comm, buffers_of(state)
    if comm.world_size == 1 or not buffers:
        return {}
    gathered = comm.gather_objects([_digest(buffer) for buffer in buffers.values()])
    owners = {
        name: [digests.index(digest) for digest in digests] for name, *digests in zip(buffers, *gathered, strict=True)
    }
    return {name: found for name, found in owners.items() if any(found)}


def own_buffers(state: TrainState, owners: Owners | None) -> dict[str, torch.Tensor]:
    """What this rank writes beside rank 0, by key. owners None: all that it might have to."""
    rank = state.comm.rank
    if rank == 0:
        return {}
    return {
        key_of(name, rank): buffer
        for name, buffer in buffers_of(state).items()
        if owners is None or (name in owners and owners[name][rank] == rank)
    }


def _digest(buffer: torch.Tensor) -> str:
    content = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content.data, digest_size=16).hexdigest()
