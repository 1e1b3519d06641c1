"""`deepspeed.utils.safe_get_...` and `safe_set_...`: read and write master weights, gradients and optimizer states of
one parameter, in full or this rank's shard, at every stage. The `full` functions are collective.

Full tensors are assembled by an all-reduce to which each rank contributes its shard. Getters return None for a
parameter that no engine trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from runtime.checkpoint.saving.snapshot import SnapshotGuard
from runtime.engine.registry import owner_of
from runtime.optim.shard_optimizer import ShardOptimizer
from runtime.plan.layout import Slot
from runtime.state.train_state import TrainState
from runtime.zero.flat import FlatParamGroup


@dataclass(frozen=True)
class _Place:
    """The location of a trained parameter in its engine."""

    state: TrainState
    guard: SnapshotGuard
    flat: FlatParamGroup
    slot: Slot

    @property
    def part(self) -> slice:
        """This parameter's elements within this rank's state shard."""
        low, high = self.flat.shard_bounds(self.slot)
        return slice(low, high)

    @property
    def of_parameter(self) -> slice:
        """The same elements within the flattened parameter."""
        low, high = self.flat.shard_bounds(self.slot)
        start = max(0, self.flat.start - self.slot.offset)
        return slice(start, start + high - low)

    @property
    def shard_optimizer(self) -> ShardOptimizer:
        """The optimizer of the flat parameter group."""
        return next(optimizer for optimizer in self.state.shard_optimizers if optimizer.flat is self.flat)

    def assembled(self, part: torch.Tensor) -> torch.Tensor:
        """(shape,) fp32 on the device: the full tensor, from every rank's part. Collective."""
        whole = torch.zeros(self.slot.numel, dtype=torch.float32, device=self.state.device)
        whole[self.of_parameter].copy_(part)
        if self.flat.state_numel < self.flat.layout.numel:
            self.state.comm.all_reduce(whole).wait()
        return whole.view(self.slot.shape)

    def own_of(self, value: torch.Tensor, what: str) -> torch.Tensor:
        """This rank's part of a full value."""
        if value.numel() != self.slot.numel:
            raise ValueError(
                f"{what}: expected a tensor of shape {list(self.slot.shape)} for {self.slot.name}, got "
                f"{list(value.shape)}"
            )
        return value.detach().reshape(-1)[self.of_parameter]


def _find(parameter: nn.Parameter) -> _Place | None:
    owner = owner_of(parameter)
    if owner is None:
        return None
    for flat in owner.state.flats:
        for slot, member in zip(flat.layout.slots, flat.members, strict=True):
            if member is parameter:
                owner.state.synchronize()
                return _Place(owner.state, owner.guard, flat, slot)
    return None


def _expected(parameter: nn.Parameter, call: str) -> _Place:
    place = _find(parameter)
    if place is None:
        raise ValueError(f"{call}: expected a parameter that an engine trains")
    return place


def _local(parameter: nn.Parameter, call: str) -> _Place:
    place = _expected(parameter, call)
    if not place.state.policy.shards_parameters:
        raise ValueError(
            f"{call}: expected stage 3; parameters are not sharded at stage {place.state.policy.stage}: call the "
            "function with full in its name"
        )
    return place


def _has_gradients(state: TrainState) -> bool:
    """Whether there are gradients; waits for copies to host memory."""
    state.settle_gradients()
    return state.accumulation.in_progress


# ---- masters ---------------------------------------------------------------------------------------------------------
def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """A copy of the full fp32 master weights of a parameter. Collective."""
    place = _find(param)
    return None if place is None else place.assembled(place.flat.masters[place.part])


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Set master weights and parameter to `value`, which must be the same on every rank. Collective."""
    place = _expected(param, "safe_set_full_fp32_param")
    _set_master(place, place.own_of(value, "safe_set_full_fp32_param"))


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """(elements in this rank's shard,) fp32: this rank's part of the master weights, not a copy."""
    place = _local(param, "safe_get_local_fp32_param")
    return place.flat.masters[place.part]


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's part of master weights and parameter. Collective."""
    _set_master(_local(param, "safe_set_local_fp32_param"), value.detach().reshape(-1))


@torch.no_grad()
def _set_master(place: _Place, value: torch.Tensor) -> None:
    """Set master weights and parameter from `value`, this rank's part. Collective."""
    state, flat = place.state, place.flat
    place.guard.wait_for_all()
    flat.wait_for_readers()
    flat.masters[place.part].copy_(value)
    if flat.masters is not flat.param_shard:
        flat.param_shard[place.part].copy_(value)
    if not flat.sharded:
        flat.all_gather_updated().wait()
        return
    with state.unsharder.unsharded([unit for unit in state.units if flat in unit.flats]):
        part = flat.param_shard[place.part]
        full = place.assembled(part).to(flat.dtype)  # the script may hold the unit unsharded
        flat.full_param[place.slot.offset : place.slot.end].copy_(full.view(-1))


# ---- optimizer states ------------------------------------------------------------------------------------------------
def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """An fp32 copy of a full optimizer state such as "exp_avg". Raises ValueError if there is none. Collective."""
    place = _find(param)
    return None if place is None else place.assembled(_state(place, optim_state_key))


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Set an optimizer state to `value`, which must be the same on every rank."""
    place = _expected(param, "safe_set_full_optimizer_state")
    place.guard.wait_for_all()
    _state(place, optim_state_key).copy_(place.own_of(value, "safe_set_full_optimizer_state"))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """(elements in this rank's shard,): this rank's part of an optimizer state, not a copy."""
    return _state(_local(param, "safe_get_local_optimizer_state"), optim_state_key)


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Set this rank's part of an optimizer state."""
    place = _local(param, "safe_set_local_optimizer_state")
    place.guard.wait_for_all()
    _state(place, optim_state_key).copy_(value.detach().reshape(-1))


def _state(place: _Place, key: str) -> torch.Tensor:
    """This rank's part of an optimizer state. Raises ValueError if there is none."""
    states = [state for state in place.shard_optimizer.states() if state.name == key]
    low, high = place.part.start, place.part.stop
    for state in states:
        if state.start <= low and high <= state.start + state.tensor.numel():
            return state.tensor[low - state.start : high - state.start]
    if low == high and (states or not place.flat.segments):
        return torch.empty(0, dtype=torch.float32, device=place.flat.masters.device)
    known = sorted({state.name for state in place.shard_optimizer.states()})
    kind = place.state.optimizer.kind
    what = f"expected one of {', '.join(known)}" if known else f"{kind} has no states before its first step"
    raise ValueError(f"optimizer state {key!r} of {place.slot.name}: {what}")


# ---- gradients -------------------------------------------------------------------------------------------------------
def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The full mean gradient over ranks and micro-steps so far, in fp32 and before clipping. Call it between backward()
    and step(); None if there is no gradient. Collective."""
    place = _find(param)
    if place is None or not _has_gradients(place.state):
        return None
    gradients = place.flat.gradients
    assert gradients is not None
    divisor = place.state.gradient_divisor
    if place.state.gradients_reduced:
        return place.assembled(gradients.reduced[place.part]) / divisor
    whole = gradients.unreduced(place.slot).to(torch.float32, copy=True)
    place.state.comm.all_reduce(whole).wait()
    return whole.view(place.slot.shape) / divisor


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace the gradient that step() uses by `value`, which must be the same on every rank. Call it after backward()
    at the boundary."""
    place = _expected(param, "safe_set_full_grad")
    _set_gradient(place, place.own_of(value, "safe_set_full_grad"), "safe_set_full_grad")


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """(elements in this rank's shard,) fp32: a copy of this rank's part of the gradient; None if there is none."""
    place = _local(param, "safe_get_local_grad")
    if not _has_gradients(place.state) or not place.state.gradients_reduced:
        return None
    return place.flat.gradient[place.part].to(torch.float32) / place.state.gradient_divisor


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace this rank's part of the gradient that step() uses."""
    _set_gradient(_local(param, "safe_set_local_grad"), value.detach().reshape(-1), "safe_set_local_grad")


def _set_gradient(place: _Place, value: torch.Tensor, call: str) -> None:
    """Set the gradient from `value`, this rank's part."""
    if not _has_gradients(place.state) or not place.state.gradients_reduced:
        raise ValueError(
            f"{call}: there is no reduced gradient to change; call it between engine.backward(loss) at the boundary "
            "and engine.step()"
        )
    gradients = place.flat.gradients
    assert gradients is not None
    gradients.forget_sum_of_squares()
    place.flat.gradient[place.part].copy_(value.to(torch.float32) * place.state.gradient_divisor)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor]
) -> None:
    """Set the gradient of each parameter to update_func(gradient, parameter). Collective."""
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))
