"""The files of a checkpoint that hold no model tensors: the manifest, common.pt, and each rank's RNG states."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checkpoint.content.buffers import BufferOwners, buffers_of
from runtime.checkpoint.content.capture import dtypes_of, frozen_names, shapes_of, tied_names
from runtime.checkpoint.content.groups import check_groups, saved_groups
from runtime.checkpoint.content.registered import Registered
from runtime.checkpoint.format.manifest import CheckpointError, Manifest
from runtime.checkpoint.format.plain import load_file, load_stream, to_bytes
from runtime.host import rng
from runtime.state.precision import DTYPES
from runtime.state.train_state import TrainState

COMMON = "common.pt"

Scalars = dict[int, dict[str, Any]]
"""Parameter group index -> optimizer states that are one value per group (such as NAdam's mu_product)."""


def rng_file(rank: int) -> str:
    """Name of the file with the RNG states of `rank`."""
    return f"rng-{rank}.pt"


def own_files(rank: int, generators: Mapping[str, rng.Generator]) -> dict[str, bytes]:
    """Files that every rank writes for itself: its RNG states. generators: those that the script registered."""
    return {rng_file(rank): to_bytes(rng.get_state(generators))}


def common_file(
    state: TrainState, scalars: Scalars, registered: Registered, client_state: dict[str, Any]
) -> dict[str, bytes]:
    """common.pt, which rank 0 writes. Raises CheckpointError if any part of it could not be read back later."""
    common = {
        "scalars": scalars,
        **saved_groups(state),
        "loss_scale": state.scaler.state_dict(),
        "registered": {name: item.state_dict() for name, item in registered.items()},
        "client_state": client_state,
    }
    common = {name: _plain(value) for name, value in common.items()}
    try:
        content = to_bytes(common)
        load_stream(io.BytesIO(content))
    except (pickle.PickleError, AttributeError, TypeError):
        for name, value in common.items():
            _try_out(name, value)
        raise
    return {COMMON: content}


def read_common(path: Path) -> dict[str, Any]:
    """The content of common.pt in the checkpoint at `path`. Raises CheckpointError if it is malformed."""
    common = load_file(path, COMMON)
    common.setdefault("loss_scale", {})  # early versions had none
    try:
        wrong = [name for name in ("scalars", "loss_scale", "registered", "client_state") if not _is_dict(common[name])]
        if not check_groups(common):
            wrong.append("groups")
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise CheckpointError(f"checkpoint {path} cannot be read: {COMMON} was not written by zerotop ({wrong[0]})")
    return common


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def read_random(path: Path, rank: int) -> Mapping[str, Any]:
    """The RNG states that rank `rank` saved. Raises CheckpointError if the file is malformed."""
    state = load_file(path, rng_file(rank))
    if wrong := rng.why_invalid(state):
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {rng_file(rank)} was not written by zerotop ({wrong})"
        )
    return state


def own_scalars(state: TrainState) -> list[tuple[int, dict[str, Any]]]:
    """(parameter group, scalars) of the groups in this rank's shards; plain types, as ranks send them to each other."""
    return [pair for optimizer in state.shard_optimizers for pair in optimizer.scalars().items()]


def merge_scalars(by_rank: list[list[tuple[int, dict[str, Any]]]]) -> Scalars:
    """The scalars of all parameter groups, from those that each rank knows."""
    return {group: scalars for pairs in by_rank for group, scalars in pairs}


def manifest_of(state: TrainState, owners: BufferOwners, with_frozen: bool = True) -> Manifest:
    """The manifest of the current state, without the file records that the writing adds."""
    frozen = frozen_names(state)
    return Manifest(
        step=state.counters.global_steps,
        optimizer_step=state.counters.optimizer_steps,
        foreign_steps=state.counters.foreign_steps,
        world_size=state.comm.world_size,
        stage=state.policy.stage,
        precision=state.config.precision,
        optimizer=state.optimizer.kind,
        groups=len(state.optimizer.param_groups),
        lr_factor=state.counters.lr_factor,
        config_digest=state.config.digest(),
        shapes=shapes_of(state),
        dtypes={
            name: str(dtype).removeprefix("torch.")
            for name, dtype in dtypes_of(state).items()
            if dtype != DTYPES[state.config.precision]
        },
        buffers={name: list(buffer.shape) for name, buffer in buffers_of(state).items()},
        buffer_owners=owners,
        tied=tied_names(state),
        frozen=frozen,
        excluded=[] if with_frozen else frozen,
    )


def _plain(value: Any) -> Any:
    """Replace numpy scalars by Python numbers: losses are often averaged with numpy, and torch.load(weights_only=True)
    refuses numpy's types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _try_out(name: str, value: Any) -> None:
    try:
        load_stream(io.BytesIO(to_bytes(value)))
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{name} holds a value that could not be loaded again ({_first_line(error)[:200]}): use plain data "
            "(numbers, strings, lists, dictionaries) and tensors"
        ) from None


def _first_line(error: BaseException) -> str:
    """The first line of the message without terminal colours, which torch always writes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()[0]
