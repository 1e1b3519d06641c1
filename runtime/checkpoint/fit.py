"""Whether a checkpoint fits an state: the first difference, in one sentence, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.checkpoint.buffers import buffers_of, key_for, key_of
from runtime.checkpoint.capture import frozen_names, shapes_of
from runtime.checkpoint.format.manifest import CheckpointError, Manifest, Wanted
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.state.train_state import TrainState

Shapes = Mapping[str, list[int]]
STRICT = "load_module_strict=False leaves what only one of them has as it is"


def compare(state: TrainState, manifest: Manifest, path: Path, wanted: Wanted) -> None:
    """What the manifest says: parameters and buffers with their shapes (dtypes may differ), the optimizer's type and
    groups. Raises CheckpointError."""
    if wanted.module:
        _compare_shapes("parameter", shapes_of(state), manifest.shapes, path, wanted.strict)
    if wanted.module and manifest.buffers is not None:
        ours = {name: list(buffer.shape) for name, buffer in buffers_of(state).items()}
        _compare_shapes("buffer", ours, manifest.buffers, path, wanted.strict)
    if wanted.module and wanted.strict and manifest.excluded:
        there = {*frozen_names(state)}
        if trained := next((name for name in manifest.excluded if name not in there), None):
            raise CheckpointError(
                f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True), and "
                f"{trained}, one of them, is trained in this model: freeze it before initialize(), or load one that "
                "holds all of them"
            )
    if not wanted.optimizer:
        return
    if manifest.optimizer != state.optimizer.kind:
        raise CheckpointError(
            f"checkpoint {path} was made with optimizer {manifest.optimizer}, the config says {state.optimizer.kind}: "
            f"set optimizer.type to {manifest.optimizer}"
        )
    if manifest.groups != len(state.optimizer.param_groups):
        raise CheckpointError(
            f"checkpoint {path} has {manifest.groups} parameter groups, the optimizer has "
            f"{len(state.optimizer.param_groups)}: make the groups as they were"
        )


def _compare_shapes(what: str, ours: Shapes, theirs: Shapes, path: Path, strict: bool) -> None:
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) == theirs.get(name) or not (strict or (name in ours and name in theirs)):
            continue
        have = f"has shape {ours[name]}" if name in ours else "does not exist"
        want = f"has shape {theirs[name]}" if name in theirs else "does not exist"
        hint = "" if name in ours and name in theirs else f" ({STRICT})"
        raise CheckpointError(
            f"checkpoint {path} does not fit the model: {what} {name} {want} in the checkpoint and {have} in the "
            f"model{hint}"
        )


def compare_tensors(
    state: TrainState, manifest: Manifest, tensors: Mapping[str, StoredTensor], path: Path, wanted: Wanted
) -> None:
    """What is really there: each parameter and buffer with as many elements, each optimizer state that this engine's
    optimizer has. Raises CheckpointError."""
    excluded = set(manifest.excluded)
    for name, shape in manifest.shapes.items():
        if name in excluded:
            continue
        found = tensors.get(f"param.{name}")
        if (found.numel if found is not None else 0) != math.prod(shape):
            there = "is not there" if found is None else f"has {found.numel:,} elements"
            raise CheckpointError(
                f"checkpoint {path} is damaged or was changed: parameter {name} {there}, its manifest says {shape}"
            )
    for name, buffer in buffers_of(state).items() if wanted.module else ():
        found = tensors.get(key_for(name, manifest, state.comm.rank, state.comm.world_size))
        if found is None and not wanted.strict:
            continue
        if found is None or found.numel != buffer.numel():
            there = "does not exist" if found is None else f"has {found.numel} elements"
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: buffer {name} {there} in the checkpoint and has shape "
                f"{list(buffer.shape)} in the model" + (f" ({STRICT})" if found is None else "")
            )
    if not wanted.optimizer or manifest.optimizer_step == 0:
        return
    frozen_then = set(manifest.frozen)
    for optimizer in state.shard_optimizers:
        names = {group: optimizer.state_names(group) for group in {slot.group for slot in optimizer.flat.layout.slots}}
        for slot in optimizer.flat.layout.slots:
            if slot.name in frozen_then or slot.name not in manifest.shapes:
                continue
            for kept in names[slot.group]:
                found = tensors.get(f"state.{kept}.{slot.name}")
                if found is not None and found.numel != slot.numel:
                    raise CheckpointError(
                        f"checkpoint {path} is damaged or was changed: optimizer state {kept} of {slot.name} has "
                        f"{found.numel:,} elements, expected {slot.numel:,}"
                    )
                if found is None:
                    raise CheckpointError(
                        f"checkpoint {path} has no optimizer state {kept} of {slot.name}, which {manifest.optimizer} "
                        "has with optimizer.params as they are now: set them as they were, or load with "
                        "load_optimizer_states=False"
                    )


def differences(
    state: TrainState, manifest: Manifest, tensors: Mapping[str, StoredTensor], path: Path
) -> Iterator[str]:
    """What fits and is still to be said: values that are not there, or were rounded."""
    if absent := [name for name in frozen_names(state) if name in set(manifest.excluded)]:
        yield (
            f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True): "
            f"{_several(absent)} keep the values that the model was built with, which must be those of its base model"
        )
    rounded = [
        f"{name} ({found.dtype}, here {ours})"
        for name, buffer in buffers_of(state).items()
        if (found := tensors.get(key_of(name))) is not None
        and buffer.is_floating_point()
        and found.dtype != (ours := str(buffer.dtype).removeprefix("torch."))
    ]
    if rounded:
        yield (
            f"checkpoint {path} holds buffers in another dtype than the model's: {_several(rounded)}. What was rounded "
            "when it was saved stays rounded; give such a buffer its exact values anew after loading"
        )


def _several(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
