"""Reading a checkpoint into a training state of any world size, stage and unit cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from runtime.checkpoint.buffers import buffers_of, key_for
from runtime.checkpoint.capture import Piece, pieces_of
from runtime.checkpoint.common import read_common, read_random
from runtime.checkpoint.fit import compare, compare_tensors, differences
from runtime.checkpoint.format.index import read_index
from runtime.checkpoint.format.manifest import (
    EVERYTHING,
    CheckpointError,
    Damaged,
    Manifest,
    Wanted,
    read_manifest,
    verify,
)
from runtime.checkpoint.format.stored import read_pieces
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.checkpoint.groups import load_groups, load_scheduler
from runtime.checkpoint.registered import Registered
from runtime.checkpoint.snapshot import SnapshotGuard
from runtime.comm import Comm
from runtime.host import rng
from runtime.state.train_state import TrainState

log = logging.getLogger("runtime.checkpoint")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds for the script."""

    client_state: dict[str, Any]
    registered: dict[str, Any]
    """Empty, as `generators` is, where progress was not wanted."""
    generators: dict[str, Any]
    """States of registered generators of random numbers, for this rank."""


@dataclass(frozen=True)
class _Content:
    """What is read before anything is changed."""

    common: dict[str, Any]
    random: Mapping[str, Any] | None
    """This rank's random number states; None where fewer ranks saved."""
    generators: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    """Where each tensor is, by name."""


def load(
    state: TrainState, registered: Registered, guard: SnapshotGuard, path: Path, wanted: Wanted = EVERYTHING
) -> Loaded:
    """Continue from the checkpoint at `path`: masters, optimizer, scheduler, random numbers, counters, as far as
    `wanted`.

    Learning rates are the checkpoint's where the configured ones are what they were when it was made, else the
    config's.
    Raises CheckpointError on every rank, before anything is changed, when the checkpoint does not fit.
    """
    state.synchronize()
    guard.wait_for_all()
    manifest = together(state.comm, lambda: read_manifest(path))
    if manifest.weights_only:
        if state.optimizer.trains and state.comm.rank == 0:
            log.warning(
                f"checkpoint {path} is of an engine without an optimizer: parameters and buffers are loaded, optimizer "
                "and step counts stay as they are"
            )
        wanted = replace(wanted, optimizer=False, scheduler=False, progress=False)
    together(state.comm, lambda: compare(state, manifest, path, wanted))
    together(state.comm, lambda: verify(path, manifest, state.comm.rank, state.comm.world_size))
    content = together(state.comm, lambda: _read(state, manifest, path))
    together(state.comm, lambda: compare_tensors(state, manifest, content.tensors, path, wanted))
    if wanted.progress:
        together(state.comm, lambda: registered.compare(content.generators))
    if state.comm.rank == 0 and wanted.module:
        for text in differences(state, manifest, content.tensors, path):
            log.warning(text)
    _load_tensors(state, manifest, path, content.tensors, wanted)
    state.masters_to_parameters()
    try:
        _load_rest(state, content.common, wanted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"checkpoint {path} holds states of the optimizer or loss scale that are none: {text}"
        ) from error
    common = content.common
    if wanted.progress:
        _load_progress(state, manifest, content, wanted)
    if not wanted.progress:
        return Loaded(dict(common["client_state"]), {}, {})
    return Loaded(dict(common["client_state"]), dict(common["registered"]), content.generators)


def together(comm: Comm, action: Callable[[], _T]) -> _T:
    """Run `action` on every rank. One that raises CheckpointError makes all of them raise what the first such rank
    did."""
    result: Any = None
    problem: CheckpointError | None = None
    try:
        result = action()
    except CheckpointError as error:
        problem = error
    told = [found for found in comm.gather_objects(problem and (isinstance(problem, Damaged), str(problem))) if found]
    if told:
        damaged, text = told[0]
        raise (Damaged if damaged else CheckpointError)(text) from problem
    return cast(_T, result)


def _read(state: TrainState, manifest: Manifest, path: Path) -> _Content:
    common = read_common(path)
    own, generators = _random_states(path, state.comm.rank, manifest.world_size)
    return _Content(common, own, generators, read_index(path, manifest))


def _random_states(path: Path, rank: int, saved: int) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """This rank's, and those of registered generators. A rank that the world that saved did not have keeps its own; but
    for generators that all ranks had alike, which must go on being alike."""
    if rank < saved:
        own = read_random(path, rank)
        return own, dict(own.get("generators", {}))
    return None, rng.common_states([read_random(path, number) for number in range(saved)])


def _load_rest(state: TrainState, common: dict[str, Any], wanted: Wanted) -> None:
    """What is no tensor of the model: scalars of the optimizer, parameter groups, scheduler, loss scale."""
    if wanted.optimizer:
        for optimizer in state.shard_optimizers:
            optimizer.load_scalars(common["scalars"])
        load_groups(state, common, wanted.scheduler)
    elif wanted.scheduler:
        load_scheduler(state, common)
    if wanted.progress and common["loss_scale"]:
        state.scaler.load_state_dict(common["loss_scale"])


def _load_progress(state: TrainState, manifest: Manifest, content: _Content, wanted: Wanted) -> None:
    state.counters.global_steps, state.counters.lr_factor = manifest.step, manifest.lr_factor
    state.accumulation.micro_steps = manifest.step * state.config.accumulation  # which may be another one now
    if wanted.optimizer:
        state.counters.optimizer_steps, state.counters.foreign_steps = manifest.optimizer_step, manifest.foreign_steps
    else:  # the states are as old as they were: so bias correction wants it
        skipped = manifest.step - manifest.optimizer_step - manifest.foreign_steps
        state.counters.foreign_steps = manifest.step - skipped - state.counters.optimizer_steps
    if content.random is not None:
        rng.set_state(content.random)


def _load_tensors(
    state: TrainState, manifest: Manifest, path: Path, tensors: Mapping[str, StoredTensor], wanted: Wanted
) -> None:
    with_states = wanted.optimizer and manifest.optimizer_step > 0
    if wanted.optimizer:
        for optimizer in state.shard_optimizers:
            optimizer.reset(to_read=with_states)
    frozen_then = set(manifest.frozen)
    comm, excluded = state.comm, {f"param.{name}" for name in manifest.excluded}

    def is_read(name: str) -> bool:
        if name.startswith("param."):
            return wanted.module and name not in excluded
        return with_states and name.split(".", 2)[2] not in frozen_then

    pieces = {name: piece for name, piece in pieces_of(state).items() if is_read(name)}
    tensors_here = {f"param.{name}": parameter.data for name, parameter in state.frozen}
    tensors_here |= {
        key_for(name, manifest, comm.rank, comm.world_size): buffer for name, buffer in buffers_of(state).items()
    }
    whole = {
        name: (tensor, Piece.whole(tensor))
        for name, tensor in tensors_here.items()
        if wanted.module and name not in excluded
    }
    pieces |= {name: piece for name, (_, piece) in whole.items()}
    together(state.comm, lambda: read_pieces(path, tensors, pieces))
    for tensor, piece in whole.values():
        tensor.copy_(piece.tensor.view(tensor.shape))
