"""Parameter groups and the scheduler that moves them: what a checkpoint keeps of both, and how they come back.

[Note: what was changed for the resume]
Every value of a parameter group comes back as it was, unless the script or the config gives another one than when the
checkpoint was made: then that one counts, from the first step on. A scheduler goes on at its step. When its base
learning rates are other ones now, they stay, and the current rates follow from them.
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
    """What common.pt has of them. "lr" and "initial_lrs" are what earlier versions read."""
    optimizer = state.optimizer
    return {
        "groups": [plain_hyperparameters(group) for group in optimizer.param_groups],
        "initial_groups": optimizer.initial_groups,
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "initial_lrs": [float(group["lr"]) for group in optimizer.initial_groups],
        "scheduler": state.lr_scheduler.state_dict() if state.lr_scheduler is not None else None,
    }


def check_groups(common: Mapping[str, Any]) -> bool:
    """Whether what `saved_groups` gave is that, whoever wrote it."""
    groups, initial = _of(common)
    return (
        len(groups) == len(initial)
        and all(isinstance(group, dict) and _is_number(group.get("lr")) for group in (*groups, *initial))
        and isinstance(common["scheduler"], dict | None)
    )


def _of(common: Mapping[str, Any]) -> tuple[Groups, Groups]:
    """The groups as they were saved, and as they began."""
    if "groups" in common:
        return common["groups"], common["initial_groups"]
    return [{"lr": lr} for lr in common["lr"]], [{"lr": lr} for lr in common["initial_lrs"]]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def load_groups(state: TrainState, common: Mapping[str, Any], with_scheduler: bool) -> None:
    """The groups' values and, if wanted, the scheduler. See [Note: what was changed for the resume]. Raises
    CheckpointError for a scheduler's state that it does not take."""
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
        _set(group, "lr", values["lr"])  # also where the scheduler takes no notice of what the config says


def load_scheduler(state: TrainState, common: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """The scheduler's state alone. Returns its base learning rates, as they were and as they are; None where it has
    none, or has set the groups' rates itself."""
    scheduler, state = state.lr_scheduler, common["scheduler"]
    if scheduler is None or state is None:
        return None
    bases = [(one, _base_lrs(one)) for one in _nested(scheduler)]
    try:
        scheduler.load_state_dict(state)
    except Exception as error:  # a script's own class may fail in any way
        raise CheckpointError(
            f"the state of the {type(scheduler).__name__} in the checkpoint can't be loaded into it "
            f"({type(error).__name__}: {error}): make the scheduler as it was, or load with "
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
    """Learning rates of the scheduler's step, from other base rates than those in the checkpoint."""
    scheduler, optimizer = state.lr_scheduler, state.optimizer
    if hasattr(scheduler, "_get_closed_form_lr"):
        rates = [float(rate) for rate in scheduler._get_closed_form_lr()]
    else:  # torch's others are multiples of the base rate
        rates = [
            float(group["lr"]) * now / then if then else float(start["lr"])
            for group, start, then, now in zip(saved, fresh, was, base, strict=True)
        ]
    for group, start, begins, rate in zip(optimizer.param_groups, fresh, optimizer.initial_groups, rates, strict=True):
        for key in start.keys() - begins.keys():  # the scheduler's own: initial_lr, max_lr, ...
            _set(group, key, start[key])
        _set(group, "lr", rate)
    scheduler._last_lr = rates


def _nested(scheduler: Any) -> Iterator[Any]:
    """The scheduler, and those that it is made of."""
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
        return other is not None and one is not None and bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)
