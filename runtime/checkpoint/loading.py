"""Reading a checkpoint into an engine of any world size, stage and unit cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from runtime.checkpoint import rng
from runtime.checkpoint.buffers import buffers_of, key_for
from runtime.checkpoint.common import read_common, read_random
from runtime.checkpoint.fitting import compare, compare_tensors, differences
from runtime.checkpoint.groups import load_groups, load_scheduler
from runtime.checkpoint.index import StoredTensor, read_index
from runtime.checkpoint.manifest import (
    EVERYTHING,
    CheckpointError,
    Damaged,
    Manifest,
    Wanted,
    read_manifest,
    verify,
)
from runtime.checkpoint.parts import Piece, pieces_of
from runtime.checkpoint.stored import read_pieces
from runtime.comm import Comm

if TYPE_CHECKING:
    from runtime.engine import Engine

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


def load(engine: Engine, path: Path, wanted: Wanted = EVERYTHING) -> Loaded:
    """Continue from the checkpoint at `path`: masters, optimizer, scheduler, random numbers, counters, as far as
    `wanted`.

    Learning rates are the checkpoint's where the configured ones are what they were when it was made, else the
    config's.
    Raises CheckpointError on every rank, before anything is changed, when the checkpoint does not fit.
    """
    engine.synchronize()
    engine.saver.before_change()
    manifest = together(engine.comm, lambda: read_manifest(path))
    if manifest.weights_only:
        if engine.optimizer.trains and engine.comm.rank == 0:
            log.warning(
                f"checkpoint {path} is of an engine without an optimizer: parameters and buffers are loaded, optimizer "
                "and step counts stay as they are"
            )
        wanted = replace(wanted, optimizer=False, scheduler=False, progress=False)
    together(engine.comm, lambda: compare(engine, manifest, path, wanted))
    together(engine.comm, lambda: verify(path, manifest, engine.comm.rank, engine.comm.world_size))
    content = together(engine.comm, lambda: _read(engine, manifest, path))
    together(engine.comm, lambda: compare_tensors(engine, manifest, content.tensors, path, wanted))
    if wanted.progress:
        together(engine.comm, lambda: engine.registered.compare(content.generators))
    if engine.comm.rank == 0 and wanted.module:
        for text in differences(engine, manifest, content.tensors, path):
            log.warning(text)
    _load_tensors(engine, manifest, path, content.tensors, wanted)
    for flat in engine.flats:
        flat.masters_to_parameters()
    engine.gathering.stale()
    for pending in [flat.gather_updated() for flat in engine.flats if not flat.sharded]:
        pending.wait()
    try:
        _load_rest(engine, content.common, wanted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"checkpoint {path} holds states of the optimizer or loss scale that are none: {text}"
        ) from error
    common = content.common
    if wanted.progress:
        _load_progress(engine, manifest, content, wanted)
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


def _read(engine: Engine, manifest: Manifest, path: Path) -> _Content:
    common = read_common(path)
    own, generators = _random_states(path, engine.comm.rank, manifest.world_size)
    return _Content(common, own, generators, read_index(path, manifest))


def _random_states(path: Path, rank: int, saved: int) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
    """This rank's, and those of registered generators. A rank that the world that saved did not have keeps its own; but
    for generators that all ranks had alike, which must go on being alike."""
    if rank < saved:
        own = read_random(path, rank)
        return own, dict(own.get("generators", {}))
    return None, rng.common_states([read_random(path, number) for number in range(saved)])


def _load_rest(engine: Engine, common: dict[str, Any], wanted: Wanted) -> None:
    """What is no tensor of the model: scalars of the optimizer, parameter groups, scheduler, loss scale."""
    if wanted.optimizer:
        for rule in engine.rules:
            rule.load_scalars(common["scalars"])
        load_groups(engine, common, wanted.scheduler)
    elif wanted.scheduler:
        load_scheduler(engine, common)
    if wanted.progress and common["loss_scale"]:
        engine.scaler.load_state_dict(common["loss_scale"])


def _load_progress(engine: Engine, manifest: Manifest, content: _Content, wanted: Wanted) -> None:
    engine.global_steps, engine.lr_factor = manifest.step, manifest.lr_factor
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()  # which may be another one now
    if wanted.optimizer:
        engine.optimizer_steps, engine.foreign_steps = manifest.optimizer_step, manifest.foreign_steps
    else:  # the states are as old as they were: so bias correction wants it
        skipped = manifest.step - manifest.optimizer_step - manifest.foreign_steps
        engine.foreign_steps = manifest.step - skipped - engine.optimizer_steps
    if content.random is not None:
        rng.set_state(content.random)


def _load_tensors(
    engine: Engine, manifest: Manifest, path: Path, tensors: Mapping[str, StoredTensor], wanted: Wanted
) -> None:
    with_states = wanted.optimizer and manifest.optimizer_step > 0
    if wanted.optimizer:
        for rule in engine.rules:
            rule.reset(to_read=with_states)
    frozen_then = set(manifest.frozen)
    comm, excluded = engine.comm, {f"param.{name}" for name in manifest.excluded}

    def is_read(name: str) -> bool:
        if name.startswith("param."):
            return wanted.module and name not in excluded
        return with_states and name.split(".", 2)[2] not in frozen_then

    pieces = {name: piece for name, piece in pieces_of(engine).items() if is_read(name)}
    tensors_here = {f"param.{name}": parameter.data for name, parameter in engine.frozen}
    tensors_here |= {
        key_for(name, manifest, comm.rank, comm.world_size): buffer for name, buffer in buffers_of(engine).items()
    }
    whole = {
        name: (tensor, Piece.whole(tensor))
        for name, tensor in tensors_here.items()
        if wanted.module and name not in excluded
    }
    pieces |= {name: piece for name, (_, piece) in whole.items()}
    together(engine.comm, lambda: read_pieces(path, tensors, pieces))
    for tensor, piece in whole.values():
        tensor.copy_(piece.tensor.view(tensor.shape))
