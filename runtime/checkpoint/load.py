"""Reading a checkpoint into a training state of any world size, stage and division into units."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from runtime.checkpoint.compatibility import check_manifest, check_tensors, load_warnings, rounding_warnings
from runtime.checkpoint.content.buffers import buffer_key_for_rank, buffers_of
from runtime.checkpoint.content.capture import pieces_of
from runtime.checkpoint.content.groups import load_groups, load_scheduler
from runtime.checkpoint.content.registered import Registered
from runtime.checkpoint.content.small_files import read_common, read_random
from runtime.checkpoint.format.index import read_index
from runtime.checkpoint.format.manifest import (
    LOAD_EVERYTHING,
    CheckpointError,
    DamagedCheckpoint,
    LoadOptions,
    Manifest,
    read_manifest,
    verify,
)
from runtime.checkpoint.format.shard_reader import read_pieces
from runtime.checkpoint.format.slices import Piece
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.comm import Comm
from runtime.host import rng
from runtime.state.train_state import TrainState

log = logging.getLogger("runtime.checkpoint")

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoadedScriptState:
    """The parts of a loaded checkpoint that belong to the script; `registered` and `generators` are empty if
    `LoadOptions.progress` is off."""

    client_state: dict[str, Any]
    registered: dict[str, Any]
    """States of registered objects, by name."""
    generators: dict[str, Any]
    """This rank's states of registered random number generators, by name."""


@dataclass(frozen=True)
class _CheckpointContent:
    """Everything that is read and checked before the training state is changed."""

    common: dict[str, Any]
    random: Mapping[str, Any] | None
    """This rank's RNG states; None if fewer ranks saved."""
    generators: dict[str, Any]
    """This rank's states of registered random number generators, by name."""
    tensors: Mapping[str, StoredTensor]
    """File locations of every tensor, by name."""


def load(
    state: TrainState, registered: Registered, guard: SnapshotGuard, path: Path, options: LoadOptions = LOAD_EVERYTHING
) -> LoadedScriptState:
    """Load master weights, optimizer states, scheduler, RNG states and counters from the checkpoint at `path`, as far
    as `options` select them. Collective.

    Learning rates come from the checkpoint, or from the config where it has changed since the checkpoint was saved.
    Raises CheckpointError on every rank, before anything is changed, if the checkpoint does not fit.
    """
    state.synchronize()
    guard.wait_for_all()
    manifest = on_all_ranks(state.comm, lambda: read_manifest(path))
    if manifest.weights_only:
        if state.optimizer.trains and state.comm.rank == 0:
            log.warning(
                f"checkpoint {path} is of an engine without an optimizer: parameters and buffers are loaded, optimizer "
                "and step counts stay as they are"
            )
        options = replace(options, optimizer=False, scheduler=False, progress=False)
    on_all_ranks(state.comm, lambda: check_manifest(state, manifest, path, options))
    on_all_ranks(state.comm, lambda: verify(path, manifest, state.comm.rank, state.comm.world_size))
    content = on_all_ranks(state.comm, lambda: _read(state, manifest, path))
    on_all_ranks(state.comm, lambda: check_tensors(state, manifest, content.tensors, path, options))
    if options.progress:
        on_all_ranks(state.comm, lambda: registered.check(content.generators))
    if state.comm.rank == 0 and options.module:
        for text in load_warnings(state, manifest, content.tensors, path):
            log.warning(text)
    if state.comm.rank == 0 and options.optimizer:
        for text in rounding_warnings(state, content.tensors, path):
            log.warning(text)
    _load_tensors(state, manifest, path, content.tensors, options)
    state.masters_to_parameters()
    try:
        _load_rest(state, content.common, options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"checkpoint {path} holds malformed optimizer scalars or loss scale state: {text}"
        ) from error
    common = content.common
    if options.progress:
        _load_progress(state, manifest, content, options)
    if not options.progress:
        return LoadedScriptState(dict(common["client_state"]), {}, {})
    return LoadedScriptState(dict(common["client_state"]), dict(common["registered"]), content.generators)


def on_all_ranks(comm: Comm, action: Callable[[], _T]) -> _T:
    """Run `action` on every rank. If it raises CheckpointError on any, all ranks raise the lowest such rank's error.
    Collective."""
    result: Any = None
    problem: CheckpointError | None = None
    try:
        result = action()
    except CheckpointError as error:
        problem = error
    mine = problem and (isinstance(problem, DamagedCheckpoint), str(problem))
    problems = [found for found in comm.gather_objects(mine) if found]
    if problems:
        damaged, text = problems[0]
        raise (DamagedCheckpoint if damaged else CheckpointError)(text) from problem
    return cast(_T, result)


def _read(state: TrainState, manifest: Manifest, path: Path) -> _CheckpointContent:
    common = read_common(path)
    own, generators = _random_states(path, state.comm.rank, manifest.world_size)
    return _CheckpointContent(common, own, generators, read_index(path, manifest))


def _random_states(path: Path, rank: int, saved: int) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """This rank's RNG states and those of its registered generators. A rank beyond the saved world size gets no RNG
    states, and only those generator states that were equal on all saved ranks and must stay equal."""
    if rank < saved:
        own = read_random(path, rank)
        return own, dict(own.get("generators", {}))
    return None, rng.common_states([read_random(path, number) for number in range(saved)])


def _load_rest(state: TrainState, common: dict[str, Any], options: LoadOptions) -> None:
    """Restore optimizer scalars, parameter groups, scheduler and loss scale."""
    if options.optimizer:
        for optimizer in state.shard_optimizers:
            optimizer.load_scalars(common["scalars"])
        load_groups(state, common, options.scheduler)
    elif options.scheduler:
        load_scheduler(state, common)
    if options.progress and common["loss_scale"]:
        state.scaler.load_state_dict(common["loss_scale"])


def _load_progress(state: TrainState, manifest: Manifest, content: _CheckpointContent, options: LoadOptions) -> None:
    state.counters.global_steps, state.counters.lr_factor = manifest.step, manifest.lr_factor
    state.accumulation.micro_steps = manifest.step * state.config.accumulation  # accumulation may have changed
    if options.optimizer:
        state.counters.optimizer_steps, state.counters.foreign_steps = manifest.optimizer_step, manifest.foreign_steps
    else:  # optimizer states were not loaded: bias correction must count their own updates only
        skipped = manifest.step - manifest.optimizer_step - manifest.foreign_steps
        state.counters.foreign_steps = manifest.step - skipped - state.counters.optimizer_steps
    if content.random is not None:
        rng.set_state(content.random)


def _load_tensors(
    state: TrainState, manifest: Manifest, path: Path, tensors: Mapping[str, StoredTensor], options: LoadOptions
) -> None:
    with_states = options.optimizer and manifest.optimizer_step > 0
    if options.optimizer:
        for optimizer in state.shard_optimizers:
            optimizer.reset(to_read=with_states)
    frozen_then = set(manifest.frozen)
    comm, excluded = state.comm, {f"param.{name}" for name in manifest.excluded}

    def is_read(name: str) -> bool:
        if name.startswith("param."):
            return options.module and name not in excluded
        return with_states and name.split(".", 2)[2] not in frozen_then

    pieces = {name: piece for name, piece in pieces_of(state).items() if is_read(name)}
    tensors_here = {f"param.{name}": parameter.data for name, parameter in state.frozen}
    tensors_here |= {
        buffer_key_for_rank(name, manifest, comm.rank, comm.world_size): buffer
        for name, buffer in buffers_of(state).items()
    }
    whole = {
        name: (tensor, Piece.full(tensor))
        for name, tensor in tensors_here.items()
        if options.module and name not in excluded
    }
    pieces |= {name: piece for name, (_, piece) in whole.items()}
    on_all_ranks(state.comm, lambda: read_pieces(path, tensors, pieces))
    for tensor, piece in whole.values():
        tensor.copy_(piece.tensor.view(tensor.shape))
