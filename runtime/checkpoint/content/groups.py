"""Saving and restoring parameter groups and the LR scheduler.

[Note: what was changed for the resume]
Every value of a parameter group is restored from the checkpoint, unless the script or config now gives another initial
value than when the checkpoint was saved: then the new value holds from the first step on. A scheduler continues at its
step; if its base learning rates have changed, the new ones hold and the current rates are computed from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from runtime.checkpoint.format.manifest import CheckpointError
from runtime.optim.lr import Schedule
from runtime.optim.optimizer import plain_hyperparameters
from runtime.state.train_state import TrainState

Groups = list[dict[str, Any]]


def saved_groups(state: TrainState) -> dict[str, Any]:
    """The entries of common.pt for groups and scheduler. "lr" and "initial_lrs" are for earlier versions' readers."""
    optimizer = state.optimizer
    return {
        "groups": [plain_hyperparameters(group) for group in optimizer.param_groups],
        "initial_groups": optimizer.initial_groups,
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "initial_lrs": [float(group["lr"]) for group in optimizer.initial_groups],
        "scheduler": state.lr_scheduler.state_dict() if state.lr_scheduler is not None else None,
    }


def check_groups(common: Mapping[str, Any]) -> bool:
    """Whether the entries that `saved_groups` writes are well-formed."""
    groups, initial = _of(common)
    return (
        len(groups) == len(initial)
        and all(isinstance(group, dict) and _is_number(group.get("lr")) for group in (*groups, *initial))
        and isinstance(common["scheduler"], dict | None)
    )


def _of(common: Mapping[str, Any]) -> tuple[Groups, Groups]:
    """(the groups as saved, the groups as initialized)."""
    if "groups" in common:
        return common["groups"], common["initial_groups"]
    return [{"lr": lr} for lr in common["lr"]], [{"lr": lr} for lr in common["initial_lrs"]]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def load_groups(state: TrainState, common: Mapping[str, Any], with_scheduler: bool) -> None:
    """Restore the groups and, with `with_scheduler`, the scheduler. See [Note: what was changed for the resume]. Raises
    CheckpointError if the scheduler refuses its state."""
    saved, initial = _of(common)
    fresh = [plain_hyperparameters(group) for group in state.optimizer.param_groups]
    for group, values, began, begins in zip(
        state.optimizer.param_groups, saved, initial, state.optimizer.initial_groups, strict=True
    ):
        for key, value in values.items():
            if key != "params" and (key not in begins or _same(begins[key], began.get(key))):
                _set(group, key, value)
    bases = load_scheduler(state, common) if with_scheduler else None
    if bases is None:
        return
    was, base = bases
    if was != base:
        _follow(state, saved, fresh, was, base)
        return
    for group, values in zip(state.optimizer.param_groups, saved, strict=True):
        _set(group, "lr", values["lr"])  # even where the scheduler ignores the config


def load_scheduler(state: TrainState, common: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """Restore the scheduler only. Returns (saved, current) base learning rates; None if it has none, or is one of
    zerotop's schedules, which set the groups' rates themselves."""
    scheduler, state = state.lr_scheduler, common["scheduler"]
    if scheduler is None or state is None:
        return None
    bases = [(one, _base_lrs(one)) for one in _nested(scheduler)]
    try:
        scheduler.load_state_dict(state)
    except Exception as error:  # a script's own class may fail in any way
        raise CheckpointError(
            f"the state of the {type(scheduler).__name__} in the checkpoint can't be loaded into it "
            f"({type(error).__name__}: {error}): build the same scheduler, or load with "
            "load_lr_scheduler_states=False"
        ) from error
    if isinstance(scheduler, Schedule):
        return None
    found = [(_base_lrs(one), base) for one, base in bases if base]
    for one, base in bases:
        if base:
            one.base_lrs = base
    return next((pair for pair in found if pair[0] != pair[1]), found[0] if found else None)


def _follow(state: TrainState, saved: Groups, fresh: Groups, was: list[float], base: list[float]) -> None:
    """Recompute the learning rates at the scheduler's step from base rates that differ from the checkpoint's."""
    scheduler, optimizer = state.lr_scheduler, state.optimizer
    if hasattr(scheduler, "_get_closed_form_lr"):
        rates = [float(rate) for rate in scheduler._get_closed_form_lr()]
    else:  # torch's others are multiples of the base rate
        rates = [
            float(group["lr"]) * now / then if then else float(start["lr"])
            for group, start, then, now in zip(saved, fresh, was, base, strict=True)
        ]
    for group, start, begins, rate in zip(optimizer.param_groups, fresh, optimizer.initial_groups, rates, strict=True):
        for key in start.keys() - begins.keys():  # set by the scheduler: initial_lr, max_lr, ...
            _set(group, key, start[key])
        _set(group, "lr", rate)
    scheduler._last_lr = rates


def _nested(scheduler: Any) -> Iterator[Any]:
    """The scheduler and, recursively, the schedulers that it combines."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _nested(part)


def _base_lrs(scheduler: Any) -> list[float]:
    return [float(rate) for rate in getattr(scheduler, "base_lrs", ())]


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    held = group.get(key)
    if isinstance(held, torch.Tensor):
        held.data.fill_(float(value))
    elif isinstance(value, torch.Tensor):
        group[key] = value.item() if isinstance(held, float) else value.clone()
    else:
        group[key] = value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            other is not None
            and one is not None
            and bool(torch.equal(torch.as_tensor(one, device="cpu"), torch.as_tensor(other, device="cpu")))
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)
