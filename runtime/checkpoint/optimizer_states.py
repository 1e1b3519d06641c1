"""`optimizer.state_dict()` and `load_state_dict()`: this rank's shards only, as in DeepSpeed. Use checkpoints to change
world size or stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from runtime.checkpoint.content.capture import pieces_of
from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.optim.optimizer import plain_hyperparameters
from runtime.state.train_state import TrainState


def optimizer_state(state: TrainState) -> dict[str, Any]:
    """Host copies of this rank's master weights and optimizer states, and the parameter groups. As in torch, "state"
    maps each parameter to a dict of tensors; its keys are names, and the master weights are among the tensors:
    {"head.weight": {"param": ..., "exp_avg": ..., "exp_avg_sq": ...}, ...}."""
    state.synchronize()
    held: dict[str, dict[str, torch.Tensor]] = {}
    for key, piece in _trained(state):
        parameter, kind = _owner(key)
        held.setdefault(parameter, {})[kind] = piece.tensor.detach().cpu().clone()
    return {
        **_place(state),
        "optimizer_steps": state.counters.optimizer_steps,
        "scalars": [optimizer.scalars() for optimizer in state.shard_optimizers],
        "state": held,
        "param_groups": [
            {**plain_hyperparameters(group), "params": list(range(len(group["params"])))}
            for group in state.optimizer.param_groups
        ],
    }


def _place(state: TrainState) -> dict[str, int]:
    return {"rank": state.comm.rank, "world_size": state.comm.world_size, "stage": state.policy.stage}


def _trained(state: TrainState) -> list[tuple[str, Any]]:
    """(key, Piece) of the master weights and optimizer states in this rank's shards."""
    frozen = {f"param.{slot.name}" for flat in state.frozen_flats for slot in flat.layout.slots}
    return [(name, piece) for name, piece in pieces_of(state).items() if name not in frozen]


def _owner(key: str) -> tuple[str, str]:
    """(parameter, "param" or the optimizer state's name) of a checkpoint's key, param.NAME or state.STATE.NAME."""
    place, _, name = key.partition(".")
    if place == "param":
        return name, place
    kind, _, parameter = name.partition(".")
    return parameter, kind


def _by_key(held: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors under the keys of a checkpoint."""
    return {
        f"param.{name}" if kind == "param" else f"state.{kind}.{name}": tensor
        for name, tensors in held.items()
        for kind, tensor in tensors.items()
    }


def load_optimizer_state(state: TrainState, guard: SnapshotGuard, saved: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned on this rank. Raises ValueError if it is from another rank, world size,
    stage or model."""
    state.synchronize()
    guard.wait_for_all()
    tensors = _check(state, saved)
    for optimizer in state.shard_optimizers:
        optimizer.reset(to_read=saved["optimizer_steps"] > 0)
    pieces = dict(_trained(state))
    for name, tensor in tensors.items():
        if name not in pieces or pieces[name].tensor.shape != tensor.shape:
            raise ValueError(f"optimizer.load_state_dict(): {name} of shape {list(tensor.shape)} does not belong to it")
        pieces[name].tensor.copy_(tensor)
    for optimizer, scalars in zip(state.shard_optimizers, saved["scalars"], strict=True):
        optimizer.load_scalars(scalars)
    state.masters_to_parameters()
    for group, values in zip(state.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})
    counters, skipped = state.counters, state.counters.skipped_steps
    counters.optimizer_steps = saved["optimizer_steps"]
    counters.foreign_steps = counters.global_steps - skipped - counters.optimizer_steps


def _check(state: TrainState, saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `saved` under the keys of a checkpoint. Raises ValueError if they do not fit, before anything is
    changed."""
    expected = (*_place(state), "optimizer_steps", "scalars", "state", "param_groups")
    if missing := next((key for key in expected if key not in saved), ""):
        raise ValueError(
            f"optimizer.load_state_dict(): {missing!r} is missing: expected the result of this optimizer's state_dict()"
        )
    for key, mine in _place(state).items():
        if saved[key] != mine:
            raise ValueError(
                f"optimizer.load_state_dict(): the states are from {key} {saved[key]}, this is {key} {mine}: load each "
                "rank's own, or use engine.load_checkpoint(), which reads any world size and stage"
            )
    ours = [len(group["params"]) for group in state.optimizer.param_groups]
    if ours != [len(group["params"]) for group in saved["param_groups"]]:
        raise ValueError("optimizer.load_state_dict(): the parameter groups differ: make the same parameter groups")
    masters = {name: piece.tensor.shape for name, piece in _trained(state) if name.startswith("param.")}
    tensors = _by_key(saved["state"])
    if masters != {name: tensor.shape for name, tensor in tensors.items() if name.startswith("param.")}:
        raise ValueError("optimizer.load_state_dict(): the states are from another model")
    return tensors
