"""Checkpoints: sharded, atomic, keyed by parameter name, readable at any world size, stage and unit cut.

    FOLDER/TAG/                 complete as soon as it has this name: written as FOLDER/.TAG.partial and renamed
      .metadata, __N_*.distcp   torch.distributed.checkpoint: fp32 masters and optimizer states as 1-D slices of each
      parameter
      common.pt                 scheduler, optimizer scalars, client_state (rank 0's)
      rng-N.pt                  random number states of rank N
      manifest.json             step, world size, parameter shapes, ...

Every collective part runs on a Gloo group of its own, so a training collective can never be mistaken for one of these.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from runtime.optim.rules import Rule, TorchRule
from runtime.zero.unit import Flat

if TYPE_CHECKING:
    from runtime.engine import Engine

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; the message says which and why."""


class Manifest(BaseModel):
    """manifest.json: what a reader must know before it opens the tensors."""

    model_config = ConfigDict(extra="ignore")

    format: int = FORMAT
    step: int
    micro_steps: int
    world_size: int
    stage: int
    precision: str
    optimizer: str
    optimizer_step: int
    lr_factor: float = 1.0
    config_digest: str
    shapes: dict[str, list[int]]
    buffers: dict[str, list[int]]
    state_names: list[str]


@dataclass(frozen=True)
class Piece:
    """A rank's slice of one parameter-sized tensor: `tensor` (numel,) are elements [start, start + numel) of
    `total`."""

    tensor: torch.Tensor
    start: int
    total: int

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Piece:
        """A tensor that one rank writes and every rank reads; flattened (a copy where it is not contiguous)."""
        flat = tensor.detach().reshape(-1)
        return cls(flat, 0, flat.numel())

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size([self.start]), sizes=torch.Size([self.tensor.numel()]))


class _SavePlanner(DefaultSavePlanner):
    """torch's planner asks tensors for their shards, which only its own distributed tensors can say; this one has the
    pieces."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, piece.chunk.offsets),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        piece.chunk, TensorProperties.create_from_tensor(piece.tensor), torch.Size([piece.total])
                    ),
                )
                for name, piece in self.pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        known: dict[str, Any] = self.metadata.state_dict_metadata
        missing = [name for name in self.pieces if name not in known]
        if missing:
            raise CheckpointError(
                f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        return LoadPlan(
            [
                item
                for name, piece in self.pieces.items()
                for item in create_read_items_for_chunk_list(name, known[name], [piece.chunk])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.fqn].tensor


# ---- saving ------------------------------------------------------------------------------------------------
def save(engine: Engine, folder: Path, tag: str, client_state: dict[str, Any] | None = None) -> Path:
    """Write FOLDER/TAG; every rank calls this at the same step. Returns the complete checkpoint's path.

    Raises CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    comm, final = engine.comm, folder / tag
    partial = folder / f".{tag}.partial"
    _on_rank_0(engine, f"create {partial}", lambda: _fresh(partial))
    try:
        pieces = dict(_pieces(engine, own_range_only=True))
        if comm.rank == 0:
            pieces |= {name: Piece.whole(tensor) for name, tensor in _whole_tensors(engine)}
        problem = ""
        try:
            state_dict_saver.save(
                {name: piece.tensor for name, piece in pieces.items()},
                storage_writer=FileSystemWriter(partial),
                planner=_SavePlanner(pieces),
                process_group=engine.checkpoint_group,
            )
            torch.save(_rng_state(), partial / f"rng-{comm.rank}.pt")
        except Exception as error:  # any rank's failure must become every rank's
            problem = f"rank {comm.rank}: {_root_cause(error)}"
        problems = [p for p in comm.gather_objects(problem) if p]
        if problems:
            raise CheckpointError(f"could not write checkpoint {final}: {problems[0]}")
        _on_rank_0(engine, f"complete {final}", lambda: _complete(engine, partial, final, client_state or {}))
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)


def _complete(engine: Engine, partial: Path, final: Path, client_state: dict[str, Any]) -> None:
    common = {
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "scalars": engine.rules[0].scalars() if engine.rules else {},
        "registered": {name: item.state_dict() for name, item in engine.registered.items()},
        "client_state": client_state,
        "lr": [float(group["lr"]) for group in engine.optimizer.param_groups],
    }
    torch.save(common, partial / "common.pt")
    (partial / MANIFEST).write_text(_manifest(engine).model_dump_json(indent=1))
    for path in partial.iterdir():
        _fsync(path)
    _fsync(partial)
    if final.exists():
        # Re-saving a tag: the old one goes aside first, for a rename does not replace a folder that has content.
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        partial.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        partial.rename(final)
    _fsync(final.parent)


def _manifest(engine: Engine) -> Manifest:
    names = sorted({state.name for rule in engine.rules for state in rule.states()})
    return Manifest(
        step=engine.global_steps,
        micro_steps=engine.micro_steps,
        world_size=engine.comm.world_size,
        stage=engine.policy.stage,
        precision=engine.config.precision,
        optimizer=engine.optimizer.kind,
        optimizer_step=engine.optimizer_steps,
        lr_factor=engine.lr_factor,
        config_digest=engine.config.digest(),
        shapes=_shapes(engine),
        buffers={name: list(tensor.shape) for name, tensor in _buffers(engine)},
        state_names=names,
    )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- loading -----------------------------------------------------------------------------------------------
def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step in `folder`; one being written, or without a readable manifest,
    does not count."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            found.append((read_manifest(path).step, path.stat().st_mtime_ns, path))
        except CheckpointError:
            continue
    return max(found)[2] if found else None


def read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {manifest.format}, this version reads {FORMAT}")
    return manifest


def load(engine: Engine, path: Path) -> dict[str, Any]:
    """Continue from the checkpoint at `path`: masters, optimizer, scheduler, random numbers, counters. Returns its
    client_state."""
    manifest = read_manifest(path)
    _compare(engine, manifest, path)
    for rule in engine.rules:
        if isinstance(rule, TorchRule) and manifest.optimizer_step > 0:
            rule.prepare()
    common = torch.load(path / "common.pt", map_location="cpu", weights_only=True)
    pieces = dict(_pieces(engine, own_range_only=False))
    if manifest.optimizer_step == 0:
        pieces = {name: piece for name, piece in pieces.items() if name.startswith("param.")}
    whole = {name: (tensor, Piece.whole(tensor)) for name, tensor in _whole_tensors(engine)}
    pieces |= {name: piece for name, (_, piece) in whole.items()}
    try:
        state_dict_loader.load(
            {name: piece.tensor for name, piece in pieces.items()},
            storage_reader=FileSystemReader(path),
            planner=_LoadPlanner(pieces),
            process_group=engine.checkpoint_group,
        )
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_root_cause(error)}") from error
    for tensor, piece in whole.values():
        tensor.copy_(piece.tensor.view(tensor.shape))
    for flat in engine.flats:
        flat.masters_to_parameters()
    for pending in [flat.gather() for flat in engine.flats]:
        pending.wait()
    for rule in engine.rules:
        rule.load_scalars(common["scalars"])
    for group, lr in zip(engine.optimizer.param_groups, common["lr"], strict=True):
        group["lr"] = lr
    if engine.lr_scheduler is not None and common["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(common["scheduler"])
    for name, item in engine.registered.items():
        if name in common["registered"]:
            item.load_state_dict(common["registered"][name])
    engine.global_steps, engine.micro_steps = manifest.step, manifest.micro_steps
    engine.optimizer_steps, engine.lr_factor = manifest.optimizer_step, manifest.lr_factor
    rng = path / f"rng-{engine.comm.rank}.pt"
    if rng.is_file():  # a larger world than the one that saved keeps its fresh states on the ranks that are new
        _set_rng_state(torch.load(rng, map_location="cpu", weights_only=True))
    return dict(common["client_state"])


def _compare(engine: Engine, manifest: Manifest, path: Path) -> None:
    """The first difference between the model and the checkpoint, by name."""
    ours, theirs = _shapes(engine), manifest.shapes
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) != theirs.get(name):
            have = f"has shape {ours[name]}" if name in ours else "does not exist"
            want = f"has shape {theirs[name]}" if name in theirs else "does not exist"
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: parameter {name} {want} in the checkpoint and "
                f"{have} in the model"
            )
    if manifest.optimizer != engine.optimizer.kind:
        raise CheckpointError(
            f"checkpoint {path} was made with optimizer {manifest.optimizer}, the config says "
            f"{engine.optimizer.kind}: set optimizer.type to {manifest.optimizer}"
        )


# ---- what is in a checkpoint -------------------------------------------------------------------------------
def _pieces(engine: Engine, own_range_only: bool) -> Iterator[tuple[str, Piece]]:
    """Masters and optimizer states of this rank by parameter name. Saving takes each rank's range once, also where all
    hold everything."""
    for flat, rule in zip(engine.flats, engine.rules, strict=True):
        start, end = flat.layout.range(engine.comm.rank) if own_range_only else (flat.start, flat.end)
        for part in flat.layout.slices(start, end):
            at = start - flat.start + part.range_start  # in the flat's state range
            yield f"param.{part.name}", Piece(flat.masters[at : at + part.numel], part.param_start, part.param_numel)
            yield from _state_pieces(rule, flat, part.name, at, part.numel, part.param_start, part.param_numel)


def _state_pieces(
    rule: Rule, _flat: Flat, name: str, at: int, numel: int, param_start: int, total: int
) -> Iterator[tuple[str, Piece]]:
    for state in rule.states():
        low = at - state.start
        if low >= 0 and low + numel <= state.tensor.numel():
            yield f"state.{state.name}.{name}", Piece(state.tensor[low : low + numel], param_start, total)


def _shapes(engine: Engine) -> dict[str, list[int]]:
    trained = {slot.name: list(slot.shape) for flat in engine.flats for slot in flat.layout.slots}
    return dict(sorted({**trained, **{name: list(p.shape) for name, p in engine.frozen}}.items()))


def _buffers(engine: Engine) -> list[tuple[str, torch.Tensor]]:
    persistent = engine.module.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.module.named_buffers() if name in persistent]


def _whole_tensors(engine: Engine) -> list[tuple[str, torch.Tensor]]:
    """What all ranks hold alike and rank 0 writes: buffers and frozen parameters."""
    buffers = [(f"buffer.{name}", tensor) for name, tensor in _buffers(engine)]
    return buffers + [(f"frozen.{name}", parameter.data) for name, parameter in engine.frozen]


def _rng_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---- helpers -----------------------------------------------------------------------------------------------
def _on_rank_0(engine: Engine, what: str, action: Any) -> None:
    """Run `action` on rank 0 only, and let its failure be everyone's, so that no rank waits for one that gave up."""
    problem = ""
    if engine.comm.rank == 0:
        try:
            action()
        except OSError as error:
            problem = f"could not {what}: {error.strerror or error}"
    problem = engine.comm.broadcast_object(problem)
    if problem:
        raise CheckpointError(problem)


def _root_cause(error: BaseException) -> str:
    """torch wraps a rank's error in a CheckpointException with every rank's traceback; people need its last line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return f"{type(error).__name__}: {error}".splitlines()[0]


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the `keep` newest complete step checkpoints of a run; returns what went."""
    steps = sorted(
        (path for path in folder.glob("step-*") if (path / MANIFEST).is_file()),
        key=lambda path: int(path.name.split("-")[1]) if path.name.split("-")[1].isdigit() else math.inf,
    )
    gone = steps[: max(0, len(steps) - keep)]
    for path in gone:
        doomed = path.with_name(f".{path.name}.pruned")
        path.rename(doomed)  # from now on no reader takes it for complete
        shutil.rmtree(doomed)
    return gone


def step_tag(step: int) -> str:
    return f"step-{step:08d}"
