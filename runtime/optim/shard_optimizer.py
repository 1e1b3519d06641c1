"""The optimizer of one rank's shard of a flat parameter group: AdamW with fused kernels, or any elementwise optimizer
of torch.optim. Both have one interface for the engine, checkpoints and offload.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from runtime import native
from runtime.comm.transfer import Copy
from runtime.host.ledger import Ledger
from runtime.optim.adamw import adamw_reference
from runtime.optim.rounding import CHUNK, round_moments, rounding_of
from runtime.plan.layout import Segment
from runtime.zero.flat import FlatParamGroup
from runtime.zero.step_decision import StepDecision

Hyper = Mapping[str, Any]
"""Hyperparameters of one optimizer parameter group: lr, betas, eps, weight_decay, ..."""


@dataclass
class State:
    """One tensor of optimizer state, for elements [start, start + numel) of the state shard."""

    name: str
    start: int
    tensor: torch.Tensor


class OptimizerStep(NamedTuple):
    """The inputs of one optimizer step."""

    groups: Sequence[Hyper]
    step: int
    """Adam's step count, from 1."""
    decision: StepDecision
    """The factor on the gradients, and whether the step is taken."""
    after: Any = None
    """With states offloaded from a GPU: mark in the compute stream (Transfers.mark) after which parameters may be
    overwritten."""


class OffloadedStates(Protocol):
    """Updates states in host memory and copies new parameters to the device (runtime/offload/upload.py)."""

    def update(self, optimizer: ShardAdamW, hypers: Sequence[dict[str, Any]], step: OptimizerStep) -> Copy:
        """Run AdamW on one shard, on the CPU, the device or both. The copy returned is complete when the new parameters
        are in `param_shard`."""

    def gradient(self, flat: FlatParamGroup, step: OptimizerStep) -> torch.Tensor:
        """(state shard,) the gradient in host memory, valid until the next call."""

    def deliver(self, flat: FlatParamGroup, step: OptimizerStep) -> Copy:
        """Copy the masters, rounded to the parameters' dtype, to `param_shard`."""


class ShardOptimizer(Protocol):
    """Updates this rank's shard of one flat parameter group."""

    flat: FlatParamGroup

    def update(self, step: OptimizerStep) -> Copy | None:
        """Update masters and `param_shard`. Returns the copy that brings the new parameters to the device; None: there
        is nothing to wait for. If states are offloaded it runs on the offload thread."""

    def states(self) -> Iterator[State]:
        """Every state tensor, to be written to or read from a checkpoint."""

    def scalars(self) -> dict[int, dict[str, Any]]:
        """Optimizer parameter group -> its states that are not per element. A rank has those of the groups in its
        shard."""

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        """Load what `scalars` returned."""

    def state_names(self, group: int) -> list[str]:
        """Names of the per-element states that parameters of this group have after a step."""

    def reset(self, to_read: bool) -> None:
        """Go back to before the first step. to_read: make all states, so that a checkpoint can be read into them; those
        that it doesn't have stay fresh."""


class ShardAdamW:
    """AdamW (arXiv 1711.05101) or Adam with L2, with moments of the state shard in fp32, or in bf16 and rounded
    stochastically (rounding.py)."""

    def __init__(
        self,
        flat: FlatParamGroup,
        decoupled: bool,
        bias_correction: bool,
        host: OffloadedStates | None = None,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.flat, self.decoupled, self.bias_correction, self.host = flat, decoupled, bias_correction, host
        self.exp_avg = flat.placement.zeros("optimizer", flat.state_numel, moments)
        self.exp_avg_sq = flat.placement.zeros("optimizer", flat.state_numel, moments)

    def update(self, step: OptimizerStep) -> Copy | None:
        """See ShardOptimizer."""
        flat, host = self.flat, self.host
        hypers = [self.kernel_arguments(group, step.step) for group in step.groups]
        if host is not None:
            return host.update(self, hypers, step)
        scale: float | torch.Tensor | None = step.decision.scale
        if scale is None:
            decided = step.decision.read()
            if decided.changed and flat.tracks_script_changes:
                flat.parameters_to_masters()
            if not decided.taken:
                return None
            scale = decided.scale
        in_place = flat.masters_in_other_memory or flat.param_shard is flat.masters
        out = None if in_place else flat.param_shard
        self.update_range(0, flat.state_numel, flat.gradient, out, hypers, step.step, scale, step.decision.changed)
        return flat.updated_masters_to_parameters() if in_place else None

    def update_range(
        self,
        low: int,
        high: int,
        gradient: torch.Tensor,
        out: torch.Tensor | None,
        hypers: Sequence[dict[str, Any]],
        step: int,
        scale: float | torch.Tensor,
        changed: torch.Tensor | None = None,
    ) -> None:
        """Update elements [low, high) of the state shard in the memory where they are. Arguments as of `pieces` and
        `update_pieces`. step: Adam's step count."""
        pieces = self.pieces(low, high, gradient, out)
        if self.exp_avg.dtype == torch.float32:
            update_pieces(pieces, hypers, scale, changed)
            return
        flat = self.flat
        for piece, segment in zip(pieces, self._segments(low, high), strict=True):
            rounding = rounding_of(flat.name, step, flat.start + segment.start)
            update_rounded(piece, rounding, hypers, scale, changed)

    def _segments(self, low: int, high: int) -> Iterator[Segment]:
        """The parts of [low, high) of the state shard that have one optimizer parameter group each."""
        for segment in self.flat.segments:
            start, end = max(segment.start, low), min(segment.end, high)
            if start < end:
                yield Segment(segment.group, start, end)

    def pieces(self, low: int, high: int, gradient: torch.Tensor, out: torch.Tensor | None) -> list[native.Range]:
        """The kernels' arguments for elements [low, high) of the state shard: one Range per run of an optimizer
        parameter group. gradient, out: (high - low,) tensors for these elements."""
        found = []
        for segment in self._segments(low, high):
            part, near = slice(segment.start, segment.end), slice(segment.start - low, segment.end - low)
            found.append(
                native.Range(
                    self.flat.masters[part],
                    self.exp_avg[part],
                    self.exp_avg_sq[part],
                    gradient[near],
                    None if out is None else out[near],
                    segment.group,
                )
            )
        return found

    def kernel_arguments(self, hyper: Hyper, step: int) -> dict[str, Any]:
        """Arguments of the kernels for one optimizer parameter group."""
        beta1, beta2 = hyper["betas"]
        return {
            # Without bias correction both terms are 1, which is what they tend to.
            "step": step if self.bias_correction else 2**40,
            "lr": float(hyper["lr"]),
            "beta1": beta1,
            "beta2": beta2,
            "eps": hyper["eps"],
            "weight_decay": hyper["weight_decay"],
            "adamw": self.decoupled,
        }

    def states(self) -> Iterator[State]:
        """See ShardOptimizer."""
        yield State("exp_avg", 0, self.exp_avg)
        yield State("exp_avg_sq", 0, self.exp_avg_sq)

    def scalars(self) -> dict[int, dict[str, Any]]:
        """Empty: Adam's only scalar is the step count, which the engine keeps."""
        return {}

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        """Do nothing: Adam's only scalar is the step count, which the engine keeps."""

    def state_names(self, group: int) -> list[str]:
        """See ShardOptimizer."""
        return ["exp_avg", "exp_avg_sq"]

    def reset(self, to_read: bool) -> None:
        """Set the moments to zero."""
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()


def update_pieces(
    pieces: Sequence[native.Range],
    hypers: Sequence[dict[str, Any]],
    scale: float | torch.Tensor,
    changed: torch.Tensor | None = None,
) -> None:
    """Run AdamW on `pieces`, all on one device: with the fused kernels if they are built, else in plain torch.

    hypers: `ShardAdamW.kernel_arguments` of every optimizer parameter group. scale: on the gradients; a tensor, and
    `changed`, as StepDecision has them.
    """
    if not pieces:
        return
    device = pieces[0].p.device
    if device.type == "cuda" and native.cuda_available():
        stream = torch.cuda.current_stream(device).cuda_stream
        on_device = scale if isinstance(scale, torch.Tensor) else None
        number = 1.0 if isinstance(scale, torch.Tensor) else scale
        structs = [native.hyper(grad_scale=number, **numbers) for numbers in hypers]
        native.cuda_adamw_ranges(
            pieces, structs, stream=stream, adamw=hypers[0]["adamw"], scale=on_device, changed=changed
        )
        return
    if isinstance(scale, torch.Tensor):
        _update_as_the_device_would(pieces, hypers, scale, changed)
        return
    fused = device.type == "cpu" and native.available()
    kernel = partial(native.adamw, threads=torch.get_num_threads()) if fused else adamw_reference
    for p, m, v, g, out, group in pieces:
        kernel(p, m, v, g, out, grad_scale=scale, **hypers[group])


def update_rounded(
    piece: native.Range,
    rounding: native.Rounding,
    hypers: Sequence[dict[str, Any]],
    scale: float | torch.Tensor,
    changed: torch.Tensor | None = None,
) -> None:
    """`update_pieces` of one piece with moments in bf16: with the fused kernel on the CPU, elsewhere chunk by chunk
    with fp32 copies of the moments, by the kernels for these."""
    p, m, v, g, out, group = piece
    if p.device.type == "cpu" and native.available() and not isinstance(scale, torch.Tensor):
        native.adamw(
            p, m, v, g, out, grad_scale=scale, rounding=rounding, threads=torch.get_num_threads(), **hypers[group]
        )
        return
    for start in range(0, p.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        wide_m, wide_v = m[part].float(), v[part].float()
        chunk = native.Range(p[part], wide_m, wide_v, g[part], None if out is None else out[part], group)
        update_pieces([chunk], hypers, scale, changed)
        round_moments(wide_m, wide_v, m[part], v[part], rounding._replace(first=rounding.first + start))


def _update_as_the_device_would(
    pieces: Sequence[native.Range],
    hypers: Sequence[dict[str, Any]],
    scale: torch.Tensor,
    changed: torch.Tensor | None,
) -> None:
    """What the CUDA kernel does with a scale and a flag that only the device knows."""
    for piece in pieces:
        if changed is not None and bool(changed) and piece.out is not None:
            same = piece.p.to(piece.out.dtype) == piece.out
            piece.p.copy_(torch.where(same, piece.p, piece.out.to(piece.p.dtype)))
    if math.isfinite(factor := float(scale)):
        update_pieces(pieces, hypers, factor)


class ShardTorchOptimizer:
    """Any elementwise optimizer of torch.optim, over the masters' segments of one parameter group each."""

    def __init__(
        self,
        flat: FlatParamGroup,
        kind: Callable[..., torch.optim.Optimizer],
        groups: Sequence[Hyper],
        ledger: Ledger,
        host: OffloadedStates | None = None,
    ) -> None:
        self.flat, self.ledger, self.host = flat, ledger, host
        self.parts = [nn.Parameter(flat.masters[s.start : s.end], requires_grad=True) for s in flat.segments]
        self._kind = kind
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self._held_bytes = 0
        self._state_names: dict[int, list[str]] = {}
        self.optimizer = self._create()
        self._account()  # some optimizers have states before the first step

    def _create(self) -> torch.optim.Optimizer:
        """A new optimizer over `parts`."""
        return self._kind(
            [
                {"params": [part], **self._groups[s.group]}
                for part, s in zip(self.parts, self.flat.segments, strict=True)
            ]
            or [{"params": [nn.Parameter(torch.zeros(0, device="cpu"))], **self._groups[0]}]
        )

    def update(self, step: OptimizerStep) -> Copy | None:
        """See ShardOptimizer."""
        flat, host = self.flat, self.host
        if host is None:
            self.step(flat.gradient, step.groups, step.decision.read().scale)
            flat.masters_to_parameters()
            return None
        self.step(host.gradient(flat, step), step.groups, step.decision.read().scale)
        return host.deliver(flat, step)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, groups: Sequence[Hyper], scale: float) -> None:
        """Update the masters. gradient: (state shard,), scaled in place."""
        gradient.mul_(scale)
        for part, segment, own in zip(self.parts, self.flat.segments, self.optimizer.param_groups, strict=False):
            part.grad = gradient[segment.start : segment.end].to(torch.float32)
            own.update({k: v for k, v in groups[segment.group].items() if k in own and k != "params"})
        if self.parts:  # a script's own optimizer may fail on a parameter without a gradient
            self.optimizer.step()
        for part in self.parts:
            part.grad = None
        self._account()

    def _account(self) -> None:
        held = sum(state.tensor.numel() * state.tensor.element_size() for state in self.states())
        self.ledger.add("optimizer", held - self._held_bytes, offloaded=self.flat.placement.offloaded)
        self._held_bytes = held

    def state_names(self, group: int) -> list[str]:
        """See ShardOptimizer."""
        if group not in self._state_names:
            part = nn.Parameter(torch.zeros(2, device="cpu"))  # a state of shape [1] is none of an element
            optimizer = self._kind([{"params": [part], **self._groups[group]}])
            _step_with_zero_gradients(optimizer, [part])
            states = optimizer.state[part].items()
            self._state_names[group] = sorted(name for name, value in states if _has_shape(value, part))
        return self._state_names[group]

    def _per_element(self, name: str, value: Any, part: torch.Tensor, group: int) -> bool:
        """Whether a state has a value for each element of its part, and is not a scalar of all of them."""
        return _has_shape(value, part) and (part.numel() > 1 or name in self.state_names(group))

    def reset(self, to_read: bool) -> None:
        """See ShardOptimizer. torch makes states in the first step, so one with zero gradients is taken to get them."""
        self.optimizer = self._create()
        if to_read:
            kept = self.flat.masters.clone()
            _step_with_zero_gradients(self.optimizer, self.parts)
            self.flat.masters.copy_(kept)
        self._account()

    def states(self) -> Iterator[State]:
        """See ShardOptimizer."""
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            for name, value in sorted(self.optimizer.state.get(part, {}).items()):
                if self._per_element(name, value, part, segment.group):
                    yield State(name, segment.start, value)

    def scalars(self) -> dict[int, dict[str, Any]]:
        """See ShardOptimizer."""
        found: dict[int, dict[str, Any]] = {}
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            state = self.optimizer.state.get(part, {})
            found[segment.group] = {
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
                if not self._per_element(name, value, part, segment.group)
            }
        return found

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        """See ShardOptimizer."""
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            state = self.optimizer.state[part]
            for name, value in scalars.get(segment.group, {}).items():
                old = state.get(name)
                state[name] = torch.full_like(old, value) if isinstance(old, torch.Tensor) else value


def _step_with_zero_gradients(optimizer: torch.optim.Optimizer, parts: Sequence[nn.Parameter]) -> None:
    if not parts:
        return
    numbers = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # it may count as a gradient
    for part in parts:
        part.grad = torch.zeros_like(part)
    if parts:
        optimizer.step()
    for part in parts:
        part.grad = None
    for group, before in zip(optimizer.param_groups, numbers, strict=True):
        group.update(before)


def _has_shape(value: Any, part: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == part.shape
