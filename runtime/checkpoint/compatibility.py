"""Checks that a checkpoint fits a training state, before anything is changed; errors name the first difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.checkpoint.content.buffers import buffer_key, buffer_key_for_rank, buffers_of
from runtime.checkpoint.content.capture import frozen_names, pieces_of, shapes_of
from runtime.checkpoint.format.manifest import CheckpointError, LoadOptions, Manifest
from runtime.checkpoint.format.tensors import StoredTensor
from runtime.models.origin import origin_of
from runtime.state.train_state import TrainState

Shapes = Mapping[str, list[int]]
STRICT = "load_module_strict=False ignores names that only one of them has"


def check_manifest(state: TrainState, manifest: Manifest, path: Path, options: LoadOptions) -> None:
    """Compare the manifest with the model: names and shapes of parameters and buffers (dtypes may differ), optimizer
    type and number of groups. Raises CheckpointError."""
    if options.module:
        _compare_shapes("parameter", shapes_of(state), manifest.shapes, path, options.strict)
    if options.module and manifest.buffers is not None:
        ours = {name: list(buffer.shape) for name, buffer in buffers_of(state).items()}
        _compare_shapes("buffer", ours, manifest.buffers, path, options.strict)
    if options.module and options.strict and manifest.excluded:
        frozen = {*frozen_names(state)}
        if trained := next((name for name in manifest.excluded if name not in frozen), None):
            raise CheckpointError(
                f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True), and this "
                f"model trains one of them, {trained}: freeze it before initialize(), or load a checkpoint that "
                "holds all parameters"
            )
    if not options.optimizer:
        return
    if manifest.optimizer != state.optimizer.kind:
        raise CheckpointError(
            f"checkpoint {path} was saved with optimizer {manifest.optimizer}, the config has {state.optimizer.kind}: "
            f"set optimizer.type to {manifest.optimizer}"
        )
    if manifest.groups != len(state.optimizer.param_groups):
        raise CheckpointError(
            f"checkpoint {path} has {manifest.groups} parameter groups, the optimizer has "
            f"{len(state.optimizer.param_groups)}: make the same parameter groups"
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


def check_tensors(
    state: TrainState, manifest: Manifest, tensors: Mapping[str, StoredTensor], path: Path, options: LoadOptions
) -> None:
    """Check that the stored tensors include every parameter and buffer in full, and every state that the optimizer
    needs. Raises CheckpointError."""
    excluded = set(manifest.excluded)
    for name, shape in manifest.shapes.items():
        if name in excluded:
            continue
        found = tensors.get(f"param.{name}")
        if (found.numel if found is not None else 0) != math.prod(shape):
            stored = "is missing" if found is None else f"has {found.numel:,} elements"
            raise CheckpointError(
                f"checkpoint {path} is damaged or was changed: parameter {name} {stored}, its manifest says {shape}"
            )
    for name, buffer in buffers_of(state).items() if options.module else ():
        found = tensors.get(buffer_key_for_rank(name, manifest, state.comm.rank, state.comm.world_size))
        if found is None and not options.strict:
            continue
        if found is None or found.numel != buffer.numel():
            stored = "does not exist" if found is None else f"has {found.numel} elements"
            raise CheckpointError(
                f"checkpoint {path} does not fit the model: buffer {name} {stored} in the checkpoint and has shape "
                f"{list(buffer.shape)} in the model" + (f" ({STRICT})" if found is None else "")
            )
    if not options.optimizer or manifest.optimizer_step == 0:
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
                        "needs with the current optimizer.params: restore the old optimizer.params, or load with "
                        "load_optimizer_states=False"
                    )


def load_warnings(
    state: TrainState, manifest: Manifest, tensors: Mapping[str, StoredTensor], path: Path
) -> Iterator[str]:
    """Warnings about a checkpoint that fits: parameters that it leaves out, and buffers that saving has rounded."""
    absent = [name for name in frozen_names(state) if name in set(manifest.excluded)]
    if absent and origin_of(state.module) is None:  # else initialize() has just read them from the base model's files
        yield (
            f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True): "
            f"{_several(absent)} keep their current values, which must be those of the base model"
        )
    rounded = [
        f"{name} ({found.dtype}, here {ours})"
        for name, buffer in buffers_of(state).items()
        if (found := tensors.get(buffer_key(name))) is not None
        and buffer.is_floating_point()
        and found.dtype != (ours := str(buffer.dtype).removeprefix("torch."))
    ]
    if rounded:
        yield (
            f"checkpoint {path} holds buffers in another dtype than the model's: {_several(rounded)}. Values rounded "
            "on saving stay rounded; assign a buffer's exact values after loading where they matter"
        )


def rounding_warnings(state: TrainState, tensors: Mapping[str, StoredTensor], path: Path) -> Iterator[str]:
    """A warning about optimizer states that loading rounds, because they are bf16 here and fp32 in the checkpoint."""
    for name, piece in pieces_of(state).items():
        found = tensors.get(name)
        if not name.startswith("state.") or found is None:
            continue
        ours = str(piece.tensor.dtype).removeprefix("torch.")
        if (found.dtype, ours) == ("float32", "bfloat16"):
            yield (
                f"checkpoint {path} holds optimizer states in fp32: they are rounded to bf16, because of "
                "zerotop.optimizer_state_dtype"
            )
            return


def _several(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
