"""Writing a checkpoint: every rank its ranges, rank 0 the rest, and a rename that makes it complete."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from runtime.checkpoint import rng
from runtime.checkpoint.describe import describe_model
from runtime.checkpoint.manifest import MANIFEST, MODEL_FILES, CheckpointError, Manifest
from runtime.checkpoint.shards import (
    Piece,
    SavePlanner,
    dtypes_of,
    persistent_buffers,
    pieces_of,
    root_cause,
    shapes_of,
    whole_tensors,
)
from runtime.comm import Comm
from runtime.precision import DTYPES

if TYPE_CHECKING:
    from runtime.engine import Engine

COMMON = "common.pt"
_LEFT_BEHIND = (".partial", ".pruned", ".replaced")


def save(engine: Engine, folder: Path, tag: str, client_state: dict[str, Any]) -> Path:
    """Write FOLDER/TAG; every rank calls this at the same step. Returns the complete checkpoint's path.

    Raises CheckpointError on every rank when any rank could not write; nothing of it remains then.
    """
    engine.synchronize()
    comm, final = engine.comm, folder / tag
    partial = folder / f".{tag}.partial"
    on_rank_0(comm, f"create {partial}", lambda: _make_room(folder, partial))
    try:
        scalars = _merged(comm.gather_objects([rule.scalars() for rule in engine.rules]))
        on_rank_0(comm, f"write {final}", lambda: _write_common(engine, partial, scalars, client_state))
        _write_tensors(engine, partial, final)
        on_rank_0(comm, f"complete {final}", lambda: _complete(partial, final))
    except BaseException:
        if comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def on_rank_0(comm: Comm, what: str, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 only, and let its failure be everyone's, so that no rank waits for one that gave up."""
    problem = ""
    if comm.rank == 0:
        try:
            action()
        except CheckpointError as error:
            problem = f"could not {what}: {error}"
        except OSError as error:
            problem = f"could not {what}: {error.strerror or error}"
        except Exception as error:
            problem = f"could not {what}: {root_cause(error)}"
    problem = comm.broadcast_object(problem)
    if problem:
        raise CheckpointError(problem)


def _make_room(folder: Path, partial: Path) -> None:
    """An empty folder to write into; what killed ranks left behind goes, and a checkpoint that was being replaced comes
    back."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.glob(".*"):
        if path.suffix not in _LEFT_BEHIND:
            continue
        original = path.with_name(path.name[1 : -len(path.suffix)])
        if path.suffix == ".replaced" and not original.exists():
            path.rename(original)
        else:
            shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(mode=0o700)


def _write_tensors(engine: Engine, partial: Path, final: Path) -> None:
    comm = engine.comm
    pieces = pieces_of(engine, own_range_only=True)
    if comm.rank == 0:
        pieces |= {name: Piece.whole(tensor) for name, tensor in whole_tensors(engine).items()}
    problem = ""
    try:
        state_dict_saver.save(
            {name: piece.tensor for name, piece in pieces.items()},
            storage_writer=FileSystemWriter(partial),
            planner=SavePlanner(pieces),
            process_group=engine.checkpoint_group,
        )
        torch.save(rng.get_state(), partial / f"rng-{comm.rank}.pt")
    except (Exception, CheckpointException) as error:  # any rank's failure must become every rank's
        problem = f"rank {comm.rank}: {root_cause(error)}"
    problems = [p for p in comm.gather_objects(problem) if p]
    if problems:
        raise CheckpointError(f"could not write {final}: {problems[0]}")


def _merged(by_rank: list[list[dict[int, dict[str, Any]]]]) -> dict[int, dict[str, Any]]:
    """A rank knows the scalars of the parameter groups in its ranges; together they know all."""
    merged: dict[int, dict[str, Any]] = {}
    for rules in by_rank:
        for scalars in rules:
            merged |= scalars
    return merged


def _write_common(
    engine: Engine, partial: Path, scalars: dict[int, dict[str, Any]], client_state: dict[str, Any]
) -> None:
    """Everything that is no tensor of the model. Tried out before the tensors are written: a checkpoint that can't be
    read back is worse than an error now."""
    common = {
        "scalars": scalars,
        "lr": [float(group["lr"]) for group in engine.optimizer.param_groups],
        "initial_lrs": engine.optimizer.initial_lrs,
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "loss_scale": engine.scaler.state_dict(),
        "registered": {name: item.state_dict() for name, item in engine.registered.items()},
        "client_state": client_state,
    }
    for name, value in common.items():
        common[name] = _plain(value)
        _try_out(name, common[name])
    torch.save(common, partial / COMMON)
    _write_description(engine, partial / MODEL_FILES)
    (partial / MANIFEST).write_text(_manifest(engine).model_dump_json(indent=1))


def _write_description(engine: Engine, folder: Path) -> None:
    files = describe_model(engine)
    if files:
        folder.mkdir(mode=0o700)
    for name, content in files.items():
        (folder / name).write_bytes(content)


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
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{name} holds something that can't be read back ({_first_line(error)[:200]}); expected plain data "
            "(numbers, strings, lists, dictionaries) and tensors"
        ) from None


def _first_line(error: BaseException) -> str:
    """Without what colours a terminal: torch sends it wherever its message goes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()[0]


def _manifest(engine: Engine) -> Manifest:
    return Manifest(
        step=engine.global_steps,
        optimizer_step=engine.optimizer_steps,
        foreign_steps=engine.foreign_steps,
        world_size=engine.comm.world_size,
        stage=engine.policy.stage,
        precision=engine.config.precision,
        optimizer=engine.optimizer.kind,
        groups=len(engine.optimizer.param_groups),
        lr_factor=engine.lr_factor,
        config_digest=engine.config.digest(),
        shapes=shapes_of(engine),
        frozen=[
            *(name for name, _ in engine.frozen),
            *(slot.name for flat in engine.frozen_flats for slot in flat.layout.slots),
        ],
        dtypes={
            name: str(dtype).removeprefix("torch.")
            for name, dtype in dtypes_of(engine).items()
            if dtype != DTYPES[engine.config.precision]
        },
        buffers={name: list(buffer.shape) for name, buffer in persistent_buffers(engine.module).items()},
    )


def _complete(partial: Path, final: Path) -> None:
    """On disk for certain, then under its name."""
    for path in partial.rglob("*"):
        _fsync(path)
    _fsync(partial)
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():
        # A rename does not replace a folder that has content. Killed in between, the next save brings the old one back.
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    _fsync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
