"""Reading a checkpoint into an engine of any world size, stage and unit cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from runtime.checkpoint import rng
from runtime.checkpoint.common import COMMON, rng_file
from runtime.checkpoint.fitting import compare, compare_tensors
from runtime.checkpoint.manifest import (
    EVERYTHING,
    CheckpointError,
    Damaged,
    Manifest,
    Wanted,
    read_manifest,
    root_cause,
    verify,
)
from runtime.checkpoint.parts import Piece, pieces_of, whole_tensors
from runtime.checkpoint.shards import LoadPlanner
from runtime.comm import Comm

if TYPE_CHECKING:
    from runtime.engine import Engine

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
    random: dict[str, Any] | None
    """This rank's random number states; None where fewer ranks saved."""
    generators: dict[str, Any]
    tensors: Mapping[str, Any]
    """torch's description of each tensor, by name."""


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
    together(engine.comm, lambda: compare(engine, manifest, path, wanted))
    together(engine.comm, lambda: verify(path, manifest, engine.comm.rank, engine.comm.world_size))
    content = together(engine.comm, lambda: _read(engine, manifest, path))
    together(engine.comm, lambda: compare_tensors(engine, manifest, content.tensors, path, wanted))
    if wanted.progress:
        together(engine.comm, lambda: engine.registered.compare(content.generators))
    _load_tensors(engine, manifest, path, wanted)
    for flat in engine.flats:
        flat.masters_to_parameters()
    engine.gathering.stale()
    for pending in [flat.gather_updated() for flat in engine.flats if not flat.sharded]:
        pending.wait()
    common = content.common
    if wanted.optimizer:
        _load_optimizer(engine, common)
    if wanted.scheduler and engine.lr_scheduler is not None and common["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(common["scheduler"])
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
    try:
        common = torch.load(path / COMMON, map_location="cpu", weights_only=True)
        own, generators = _random_states(path, engine.comm.rank, manifest.world_size)
        tensors = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {root_cause(error)}") from error
    return _Content(common, own, generators, tensors)


def _random_states(path: Path, rank: int, saved: int) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """This rank's, and those of registered generators. A rank that the world that saved did not have keeps its own; but
    for generators that all ranks had alike, which must go on being alike."""

    def of(number: int) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(path / rng_file(number), map_location="cpu", weights_only=True)
        return found

    if rank < saved:
        own = of(rank)
        return own, dict(own.get("generators", {}))
    return None, rng.common_states([of(number) for number in range(saved)])


def _load_optimizer(engine: Engine, common: dict[str, Any]) -> None:
    for rule in engine.rules:
        rule.load_scalars(common["scalars"])
    if common["initial_lrs"] == engine.optimizer.initial_lrs:
        for group, lr in zip(engine.optimizer.param_groups, common["lr"], strict=True):
            group["lr"] = lr


def _load_progress(engine: Engine, manifest: Manifest, content: _Content, wanted: Wanted) -> None:
    if "loss_scale" in content.common:
        engine.scaler.load_state_dict(content.common["loss_scale"])
    engine.global_steps, engine.lr_factor = manifest.step, manifest.lr_factor
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()  # which may be another one now
    if wanted.optimizer:
        engine.optimizer_steps, engine.foreign_steps = manifest.optimizer_step, manifest.foreign_steps
    else:  # the states are as old as they were: so bias correction wants it
        skipped = manifest.step - manifest.optimizer_step - manifest.foreign_steps
        engine.foreign_steps = manifest.step - skipped - engine.optimizer_steps
    if content.random is not None:
        rng.set_state(content.random)


def _load_tensors(engine: Engine, manifest: Manifest, path: Path, wanted: Wanted) -> None:
    with_states = wanted.optimizer and manifest.optimizer_step > 0
    if wanted.optimizer:
        for rule in engine.rules:
            rule.reset(to_read=with_states)
    frozen_then = set(manifest.frozen)
    pieces = {
        name: piece
        for name, piece in pieces_of(engine).items()
        if name.startswith("param.") or (with_states and name.split(".", 2)[2] not in frozen_then)
    }
    whole = {name: (tensor, Piece.whole(tensor)) for name, tensor in whole_tensors(engine).items()}
    pieces |= {name: piece for name, (_, piece) in whole.items()}
    try:
        state_dict_loader.load(
            {name: piece.tensor for name, piece in pieces.items()},
            storage_reader=FileSystemReader(path),
            planner=LoadPlanner(pieces, wanted.strict),
            process_group=engine.checkpoint_group,
        )
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {root_cause(error)}") from error
    for tensor, piece in whole.values():
        tensor.copy_(piece.tensor.view(tensor.shape))
