"""Reading a checkpoint into an engine of any world size, stage and unit cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from runtime.checkpoint import rng
from runtime.checkpoint.common import COMMON, rng_file
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
from runtime.checkpoint.parts import Piece, pieces_of, shapes_of, whole_tensors
from runtime.checkpoint.shards import LoadPlanner
from runtime.comm import Comm
from runtime.optim.rules import TorchRule

if TYPE_CHECKING:
    from runtime.engine import Engine


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds for the script."""

    client_state: dict[str, Any]
    registered: dict[str, Any]


def load(engine: Engine, path: Path, wanted: Wanted = EVERYTHING) -> Loaded:
    """Continue from the checkpoint at `path`: masters, optimizer, scheduler, random numbers, counters, as far as
    `wanted`.

    Learning rates are the checkpoint's where the configured ones are what they were when it was made, else the
    config's.
    Raises CheckpointError before anything is changed when the checkpoint does not fit.
    """
    engine.synchronize()
    engine.saver.before_change()
    manifest = read_manifest(path)
    _compare(engine, manifest, path, wanted)
    verify_together(engine.comm, path, manifest)
    try:
        common = torch.load(path / COMMON, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path / COMMON} cannot be read: {root_cause(error)}") from error
    _load_tensors(engine, manifest, path, wanted)
    for flat in engine.flats:
        flat.masters_to_parameters()
    engine.gathering.stale()
    for pending in [flat.gather_updated() for flat in engine.flats if not flat.sharded]:
        pending.wait()
    if wanted.optimizer:
        _load_optimizer(engine, common)
    if wanted.scheduler and engine.lr_scheduler is not None and common["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(common["scheduler"])
    if wanted.progress:
        _load_progress(engine, manifest, common, path, wanted)
    return Loaded(dict(common["client_state"]), dict(common["registered"]))


def verify_together(comm: Comm, path: Path, manifest: Manifest) -> None:
    """Raises Damaged on every rank where a file of the checkpoint is not what was written; each rank reads its share
    of the bytes."""
    problem = ""
    try:
        verify(path, manifest, comm.rank, comm.world_size)
    except Damaged as error:
        problem = str(error)
    problems = [found for found in comm.gather_objects(problem) if found]
    if problems:
        raise Damaged(problems[0])


def _load_optimizer(engine: Engine, common: dict[str, Any]) -> None:
    for rule in engine.rules:
        rule.load_scalars(common["scalars"])
    if common["initial_lrs"] == engine.optimizer.initial_lrs:
        for group, lr in zip(engine.optimizer.param_groups, common["lr"], strict=True):
            group["lr"] = lr


def _load_progress(engine: Engine, manifest: Manifest, common: dict[str, Any], path: Path, wanted: Wanted) -> None:
    if "loss_scale" in common:
        engine.scaler.load_state_dict(common["loss_scale"])
    engine.global_steps, engine.lr_factor = manifest.step, manifest.lr_factor
    engine.micro_steps = manifest.step * engine.gradient_accumulation_steps()  # which may be another one now
    if wanted.optimizer:
        engine.optimizer_steps, engine.foreign_steps = manifest.optimizer_step, manifest.foreign_steps
    else:  # the states are as old as they were: so bias correction wants it
        skipped = manifest.step - manifest.optimizer_step - manifest.foreign_steps
        engine.foreign_steps = manifest.step - skipped - engine.optimizer_steps
    states = path / rng_file(engine.comm.rank)
    if states.is_file():  # a larger world than the one that saved keeps its fresh states on the ranks that are new
        rng.set_state(torch.load(states, map_location="cpu", weights_only=True))


def _load_tensors(engine: Engine, manifest: Manifest, path: Path, wanted: Wanted) -> None:
    with_states = wanted.optimizer and manifest.optimizer_step > 0
    if with_states:
        for rule in engine.rules:
            if isinstance(rule, TorchRule):
                rule.prepare()
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


def _compare(engine: Engine, manifest: Manifest, path: Path, wanted: Wanted) -> None:
    """The first difference between the engine and the checkpoint, by name."""
    ours, theirs = shapes_of(engine), manifest.shapes
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) != theirs.get(name) and (wanted.strict or (name in ours and name in theirs)):
            have = f"has shape {ours[name]}" if name in ours else "does not exist"
            want = f"has shape {theirs[name]}" if name in theirs else "does not exist"
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: "
                f"parameter {name} {want} in the checkpoint and {have} in the model"
            )
    if not wanted.optimizer:
        return
    if manifest.optimizer != engine.optimizer.kind:
        raise CheckpointError(
            f"checkpoint {path} was made with optimizer {manifest.optimizer}, the config says {engine.optimizer.kind}: "
            f"set optimizer.type to {manifest.optimizer}"
        )
    if manifest.groups != len(engine.optimizer.param_groups):
        raise CheckpointError(
            f"checkpoint {path} has {manifest.groups} parameter groups, the optimizer has "
            f"{len(engine.optimizer.param_groups)}: make the groups as they were"
        )
