"""`deepspeed.utils.safe_get_...` and `safe_set_...`: masters, gradients and optimizer states of one parameter, whole or
this rank's part, at every stage. What is whole every rank must ask for, and in the same order.

Whole tensors are put together by one sum over ranks, to which each contributes its shard. Getters return None for a
parameter that no engine trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from runtime.checkpoint.snapshot import SnapshotGuard
from runtime.engine.registry import owner_of
from runtime.optim.shard_optimizer import ShardOptimizer
from runtime.plan.layout import Slot
from runtime.state.train_state import TrainState
from runtime.zero.flat import FlatParamGroup


@dataclass(frozen=True)
class _Place:
    """Where a trained parameter is."""

    state: TrainState
    guard: SnapshotGuard
    flat: FlatParamGroup
    slot: Slot

    @property
    def part(self) -> slice:
        """Of the state shard: the elements that are this parameter's."""
        low, high = self.flat.shard_bounds(self.slot)
        return slice(low, high)

    @property
    def of_parameter(self) -> slice:
        """The same elements, as they lie in the parameter."""
        low, high = self.flat.shard_bounds(self.slot)
        start = max(0, self.flat.start - self.slot.offset)
        return slice(start, start + high - low)

    @property
    def shard_optimizer(self) -> ShardOptimizer:
        return next(optimizer for optimizer in self.state.shard_optimizers if optimizer.flat is self.flat)

    def assembled(self, part: torch.Tensor) -> torch.Tensor:
        """(shape,) fp32 on the device, from every rank's part."""
        whole = torch.zeros(self.slot.numel, dtype=torch.float32, device=self.state.device)
        whole[self.of_parameter].copy_(part)
        if self.flat.state_numel < self.flat.layout.numel:
            self.state.comm.all_reduce(whole).wait()
        return whole.view(self.slot.shape)

    def own_of(self, value: torch.Tensor, what: str) -> torch.Tensor:
        """This rank's part of a whole value."""
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
            f"{call}: expected stage 3; at stage {place.state.policy.stage} parameters are whole: call the "
            "function with full in its name"
        )
    return place


def _have_arrived(state: TrainState) -> bool:
    """Whether there are gradients: waits for those that are on their way to host memory."""
    state.settle_gradients()
    return state.accumulation.in_progress


# ---- masters ---------------------------------------------------------------------------------------------------------
def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """The fp32 master of a parameter, a copy."""
    place = _find(param)
    return None if place is None else place.assembled(place.flat.masters[place.part])


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Master and parameter become `value`, which must be the same on every rank."""
    place = _expected(param, "safe_set_full_fp32_param")
    _set_master(place, place.own_of(value, "safe_set_full_fp32_param"))


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """(elements of it in this rank's shard,): the part of the master that this rank holds, not a copy."""
    place = _local(param, "safe_get_local_fp32_param")
    return place.flat.masters[place.part]


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """The part of this rank; every rank must call it."""
    _set_master(_local(param, "safe_set_local_fp32_param"), value.detach().reshape(-1))


@torch.no_grad()
def _set_master(place: _Place, value: torch.Tensor) -> None:
    """value: this rank's part."""
    state, flat = place.state, place.flat
    place.guard.wait_for_all()
    flat.masters[place.part].copy_(value)
    if flat.masters is not flat.param_shard:
        flat.param_shard[place.part].copy_(value)
    if not flat.sharded:
        flat.all_gather_updated().wait()
        return
    with state.unsharder.unsharded([unit for unit in state.units if flat in unit.flats]):
        whole = place.assembled(flat.param_shard[place.part]).to(
            flat.dtype
        )  # one that a script holds must show it, too
        flat.full_param[place.slot.offset : place.slot.end].copy_(whole.view(-1))


# ---- optimizer states ------------------------------------------------------------------------------------------------
def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """One state of the optimizer, such as "exp_avg", a copy in fp32. Raises ValueError where it has no such state."""
    place = _find(param)
    return None if place is None else place.assembled(_state(place, optim_state_key))


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    place = _expected(param, "safe_set_full_optimizer_state")
    place.guard.wait_for_all()
    _state(place, optim_state_key).copy_(place.own_of(value, "safe_set_full_optimizer_state"))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """The part that this rank holds, not a copy."""
    return _state(_local(param, "safe_get_local_optimizer_state"), optim_state_key)


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    place = _local(param, "safe_set_local_optimizer_state")
    place.guard.wait_for_all()
    _state(place, optim_state_key).copy_(value.detach().reshape(-1))


def _state(place: _Place, key: str) -> torch.Tensor:
    """This rank's part of it."""
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
    """The mean gradient over ranks and micro-steps so far, before clipping, in fp32: between backward() and step().
    None where there is none."""
    place = _find(param)
    if place is None or not _have_arrived(place.state):
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
    """step() will use `value`, which must be the same on every rank: after backward() at the boundary."""
    place = _expected(param, "safe_set_full_grad")
    _set_gradient(place, place.own_of(value, "safe_set_full_grad"), "safe_set_full_grad")


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The part in this rank's shard, a copy in fp32. None where there is none."""
    place = _local(param, "safe_get_local_grad")
    if not _have_arrived(place.state) or not place.state.gradients_reduced:
        return None
    return place.flat.gradient[place.part].to(torch.float32) / place.state.gradient_divisor


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    _set_gradient(_local(param, "safe_set_local_grad"), value.detach().reshape(-1), "safe_set_local_grad")


def _set_gradient(place: _Place, value: torch.Tensor, call: str) -> None:
    """value: this rank's part."""
    if not _have_arrived(place.state) or not place.state.gradients_reduced:
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
    """gradient = update_func(gradient, parameter) for each."""
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))
