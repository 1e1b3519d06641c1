"""How one shard of a flat parameter group is updated: AdamW by the fused kernel, other elementwise optimizers of
torch.optim by themselves.

Both have one interface, so that engine, checkpoints and offload don't ask which optimizer it is.
"""

from __future__ import annotations

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
from runtime.zero.flat import FlatParamGroup

Hyper = Mapping[str, Any]
"""One optimizer parameter group's numbers: lr, betas, eps, weight_decay, ..."""


@dataclass
class State:
    """One tensor of optimizer state: `tensor` covers elements [start, start + numel) of the flat's state shard."""

    name: str
    start: int
    tensor: torch.Tensor


class OptimizerStep(NamedTuple):
    """The numbers of one optimizer step."""

    groups: Sequence[Hyper]
    step: int
    """Adam's step count, from 1."""
    scale: float
    """Factor on the gradients."""
    after: Any = None
    """On a GPU, with offloaded states: the point of the computing stream up to which old parameters are read."""


class OffloadedStates(Protocol):
    """The way between states in host memory and parameters on the device (runtime/offload/upload.py)."""

    def update(self, optimizer: ShardAdamW, hypers: Sequence[dict[str, Any]], step: OptimizerStep) -> Copy:
        """AdamW on one shard, by the CPU, the device or both. The copy is complete when the new parameters are where
        they are used."""

    def gradient(self, flat: FlatParamGroup, step: OptimizerStep) -> torch.Tensor:
        """(state shard,) the gradient in host memory, valid until the next call."""

    def deliver(self, flat: FlatParamGroup, step: OptimizerStep) -> Copy:
        """Send the masters, rounded to the parameters' dtype, to the parameters."""


class ShardOptimizer(Protocol):
    """Updates this rank's shard of one flat parameter group."""

    flat: FlatParamGroup

    def update(self, step: OptimizerStep) -> Copy | None:
        """Leave the new values in masters and own parameters. Returns the copy that brings new parameters to the
        device; None: they are there. Where states are offloaded it runs on another thread than the training's."""

    def states(self) -> Iterator[State]:
        """Every state tensor, to be written to or read from a checkpoint."""

    def scalars(self) -> dict[int, dict[str, Any]]:
        """States that are not per element, by parameter group; a rank knows those of the groups in its range."""

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None: ...

    def state_names(self, group: int) -> list[str]:
        """Of the states that parameters of this group have after a step."""

    def reset(self, to_read: bool) -> None:
        """Back to before the first step. to_read: all states exist then, so that a checkpoint can be read into them;
        those that it doesn't have are fresh."""


class ShardAdamW:
    """AdamW (arXiv 1711.05101) or Adam with L2, fp32 moments over the whole state shard."""

    def __init__(
        self, flat: FlatParamGroup, decoupled: bool, bias_correction: bool, host: OffloadedStates | None = None
    ) -> None:
        self.flat, self.decoupled, self.bias_correction, self.host = flat, decoupled, bias_correction, host
        self.exp_avg = flat.placement.zeros("optimizer", flat.state_numel)
        self.exp_avg_sq = flat.placement.zeros("optimizer", flat.state_numel)

    def update(self, step: OptimizerStep) -> Copy | None:
        flat, host = self.flat, self.host
        hypers = [self.numbers(group, step.step) for group in step.groups]
        if host is not None:
            return host.update(self, hypers, step)
        in_place = flat.masters_in_other_memory or flat.param_shard is flat.masters
        pieces = self.pieces(0, flat.state_numel, flat.gradient, None if in_place else flat.param_shard)
        update_pieces(pieces, hypers, step.scale)
        if in_place:
            flat.masters_to_parameters()
        return None

    def pieces(self, low: int, high: int, gradient: torch.Tensor, out: torch.Tensor | None) -> list[native.Range]:
        """One for each parameter group's run in elements [low, high) of the state shard. gradient and out begin at
        `low`."""
        found = []
        for segment in self.flat.segments:
            start, end = max(segment.start, low), min(segment.end, high)
            if start < end:
                part, near = slice(start, end), slice(start - low, end - low)
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

    def numbers(self, hyper: Hyper, step: int) -> dict[str, Any]:
        """One group's arguments of the kernels."""
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
        yield State("exp_avg", 0, self.exp_avg)
        yield State("exp_avg_sq", 0, self.exp_avg_sq)

    def scalars(self) -> dict[int, dict[str, Any]]:
        return {}

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        """Nothing to take: Adam's only scalar is the step count, which the engine keeps."""

    def state_names(self, group: int) -> list[str]:
        return ["exp_avg", "exp_avg_sq"]

    def reset(self, to_read: bool) -> None:
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()


def update_pieces(pieces: Sequence[native.Range], hypers: Sequence[dict[str, Any]], scale: float) -> None:
    """AdamW where the pieces lie, all on one device: our fused kernels where they are built, else plain torch.

    hypers: `ShardAdamW.numbers` of every parameter group. scale: factor on the gradients.
    """
    if not pieces:
        return
    device = pieces[0].p.device
    if device.type == "cuda" and native.cuda_available():
        stream = torch.cuda.current_stream(device).cuda_stream
        structs = [native.hyper(grad_scale=scale, **numbers) for numbers in hypers]
        native.cuda_adamw_ranges(pieces, structs, stream=stream, adamw=hypers[0]["adamw"])
        return
    fused = device.type == "cpu" and native.available()
    kernel = partial(native.adamw, threads=torch.get_num_threads()) if fused else adamw_reference
    for p, m, v, g, out, group in pieces:
        kernel(p, m, v, g, out, grad_scale=scale, **hypers[group])


class ShardTorchOptimizer:
    """Any elementwise optimizer of torch.optim, unchanged, over segments of the masters."""

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
        self._held = 0
        self.optimizer = self._made()
        self._account()  # some have states before the first step

    def _made(self) -> torch.optim.Optimizer:
        """A fresh one."""
        return self._kind(
            [
                {"params": [part], **self._groups[s.group]}
                for part, s in zip(self.parts, self.flat.segments, strict=True)
            ]
            or [{"params": [nn.Parameter(torch.zeros(0))], **self._groups[0]}]
        )

    def update(self, step: OptimizerStep) -> Copy | None:
        flat, host = self.flat, self.host
        if host is None:
            self.step(flat.gradient, step.groups, step.scale)
            flat.masters_to_parameters()
            return None
        self.step(host.gradient(flat, step), step.groups, step.scale)
        return host.deliver(flat, step)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, groups: Sequence[Hyper], scale: float) -> None:
        """New masters; `gradient` (state shard,) is scaled in place."""
        gradient.mul_(scale)
        for part, segment, own in zip(self.parts, self.flat.segments, self.optimizer.param_groups, strict=False):
            part.grad = gradient[segment.start : segment.end].to(torch.float32)
            own.update({k: v for k, v in groups[segment.group].items() if k in own and k != "params"})
        if self.parts:  # an optimizer of a script's own need not bear a parameter without a gradient
            self.optimizer.step()
        for part in self.parts:
            part.grad = None
        self._account()

    def _account(self) -> None:
        held = sum(state.tensor.numel() * state.tensor.element_size() for state in self.states())
        self.ledger.add("optimizer", held - self._held, offloaded=self.flat.placement.offloaded)
        self._held = held

    def state_names(self, group: int) -> list[str]:
        part = nn.Parameter(torch.zeros(1))
        optimizer = self._kind([{"params": [part], **self._groups[group]}])
        _take_empty_step(optimizer, [part])
        return sorted(name for name, value in optimizer.state[part].items() if _per_element(value, part))

    def reset(self, to_read: bool) -> None:
        """torch makes the states in the first step: one without a gradient leaves them as if there had been none."""
        self.optimizer = self._made()
        if to_read:
            kept = self.flat.masters.clone()
            _take_empty_step(self.optimizer, self.parts)
            self.flat.masters.copy_(kept)
        self._account()

    def states(self) -> Iterator[State]:
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            for name, value in sorted(self.optimizer.state.get(part, {}).items()):
                if isinstance(value, torch.Tensor) and value.shape == part.shape and value.dim() > 0:
                    yield State(name, segment.start, value)

    def scalars(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            state = self.optimizer.state.get(part, {})
            found[segment.group] = {
                name: value.item() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
                if not _per_element(value, part)
            }
        return found

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        for part, segment in zip(self.parts, self.flat.segments, strict=True):
            state = self.optimizer.state[part]
            for name, value in scalars.get(segment.group, {}).items():
                old = state.get(name)
                state[name] = torch.full_like(old, value) if isinstance(old, torch.Tensor) else value


def _take_empty_step(optimizer: torch.optim.Optimizer, parts: Sequence[nn.Parameter]) -> None:
    if not parts:
        return
    numbers = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = 0.0  # which would be a gradient
    for part in parts:
        part.grad = torch.zeros_like(part)
    if parts:
        optimizer.step()
    for part in parts:
        part.grad = None
    for group, before in zip(optimizer.param_groups, numbers, strict=True):
        group.update(before)


def _per_element(value: Any, part: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == part.shape
