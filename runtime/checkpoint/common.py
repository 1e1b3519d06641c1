"""What a checkpoint holds beside tensors of the model: the manifest, common.pt, and each rank's random numbers."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.checkpoint.buffers import Owners, buffers_of
from runtime.checkpoint.capture import dtypes_of, frozen_names, shapes_of, tied_names
from runtime.checkpoint.format.manifest import CheckpointError, Manifest
from runtime.checkpoint.format.plain import load_file, load_stream, to_bytes
from runtime.checkpoint.groups import check_groups, saved_groups
from runtime.checkpoint.registered import Registered
from runtime.host import rng
from runtime.state.precision import DTYPES
from runtime.state.train_state import TrainState

COMMON = "common.pt"

Scalars = dict[int, dict[str, Any]]
"""States of the optimizer that are not per element, by parameter group."""


def rng_file(rank: int) -> str:
    return f"rng-{rank}.pt"


def own_files(rank: int, generators: Mapping[str, rng.Generator]) -> dict[str, bytes]:
    """What every rank writes of its own: its random number states. generators: those that the script registered."""
    return {rng_file(rank): to_bytes(rng.get_state(generators))}


def common_file(
    state: TrainState, scalars: Scalars, registered: Registered, client_state: dict[str, Any]
) -> dict[str, bytes]:
    """common.pt, which rank 0 writes for all. Raises CheckpointError for what could not be read back: a checkpoint like
    that is worse than an error now."""
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
    """common.pt of the checkpoint at `path`. Raises CheckpointError for one that zerotop did not write."""
    common = load_file(path, COMMON)
    common.setdefault("loss_scale", {})  # early versions had none
    try:
        wrong = [name for name in ("scalars", "loss_scale", "registered", "client_state") if not _is_dict(common[name])]
        if not check_groups(common):
            wrong.append("groups")
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise CheckpointError(f"checkpoint {path} cannot be read: {COMMON} is not what zerotop writes ({wrong[0]})")
    return common


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def read_random(path: Path, rank: int) -> Mapping[str, Any]:
    """The random number states that rank `rank` saved. Raises CheckpointError for what is none."""
    state = load_file(path, rng_file(rank))
    if wrong := rng.why_invalid(state):
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {rng_file(rank)} is not what zerotop writes ({wrong})"
        )
    return state


def own_scalars(state: TrainState) -> list[tuple[int, dict[str, Any]]]:
    """Of the parameter groups in this rank's shards; plain, for they go from rank to rank."""
    return [pair for optimizer in state.shard_optimizers for pair in optimizer.scalars().items()]


def merged(by_rank: list[list[tuple[int, dict[str, Any]]]]) -> Scalars:
    """Together the ranks know the scalars of all parameter groups."""
    return {group: scalars for pairs in by_rank for group, scalars in pairs}


def manifest_of(state: TrainState, owners: Owners, with_frozen: bool = True) -> Manifest:
    """Without what the writing itself adds."""
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
    """numpy scalars as Python numbers: losses are often averaged with numpy, and its types are not read back."""
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
            f"{name} holds something that can't be read back ({_first_line(error)[:200]}); expected plain data "
            "(numbers, strings, lists, dictionaries) and tensors"
        ) from None


def _first_line(error: BaseException) -> str:
    """Without what colours a terminal: torch sends it wherever its message goes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()[0]
