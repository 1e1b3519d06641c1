"""How one flat's own range is updated: AdamW by our fused kernel, any other elementwise torch.optim by itself.

Both have one interface, so that the engine, the checkpoint and later offload don't ask which optimizer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from runtime import native
from runtime.host.ledger import Ledger
from runtime.offload.upload import HostSide
from runtime.optim.adamw import adamw_reference
from runtime.zero.flat import Flat

Hyper = Mapping[str, Any]
"""One optimizer parameter group's numbers: lr, betas, eps, weight_decay, ..."""


@dataclass
class State:
    """One tensor of optimizer state: `tensor` covers elements [start, start + numel) of the flat's state range."""

    name: str
    start: int
    tensor: torch.Tensor


class Rule(Protocol):
    flat: Flat

    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        """Take optimizer step `step` (from 1) with gradient x `scale`, and leave the new values in masters and own
        parameters. It may run on another thread than the training's where the flat's states are offloaded."""

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


class AdamRule:
    """AdamW (arXiv 1711.05101) or Adam with L2, fp32 moments over the whole state range."""

    def __init__(self, flat: Flat, decoupled: bool, bias_correction: bool, host: HostSide | None = None) -> None:
        self.flat, self.decoupled, self.bias_correction, self.host = flat, decoupled, bias_correction, host
        self.exp_avg = flat.home.zeros("optimizer", flat.state_numel)
        self.exp_avg_sq = flat.home.zeros("optimizer", flat.state_numel)

    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        flat, host = self.flat, self.host
        if host is not None:
            hypers = [self.numbers(group, step) for group in groups]
            host.update(self, hypers, scale)
        elif flat.apart or flat.own_parameters is flat.masters:
            self.step(flat.gradient, None, groups, step, scale)
            flat.masters_to_parameters()
        else:
            self.step(flat.gradient, flat.own_parameters, groups, step, scale)

    def step(
        self, gradient: torch.Tensor, out: torch.Tensor | None, groups: Sequence[Hyper], step: int, scale: float
    ) -> None:
        """All of the state range where it lies; out (state range,): takes what the new masters round to."""
        hypers = [self.numbers(group, step) for group in groups]
        update_pieces(self.pieces(0, self.flat.state_numel, gradient, out), hypers, scale)

    def pieces(self, low: int, high: int, gradient: torch.Tensor, out: torch.Tensor | None) -> list[native.Range]:
        """One for each parameter group's run in elements [low, high) of the state range. gradient and out begin at
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

    hypers: `AdamRule.numbers` of every parameter group. scale: factor on the gradients.
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


class TorchRule:
    """Any elementwise optimizer of torch.optim, unchanged, over segments of the masters."""

    def __init__(
        self,
        flat: Flat,
        kind: Callable[..., torch.optim.Optimizer],
        groups: Sequence[Hyper],
        ledger: Ledger,
        host: HostSide | None = None,
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

    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        flat, host = self.flat, self.host
        if host is None:
            self.step(flat.gradient, groups, scale)
            flat.masters_to_parameters()
            return

        self.step(host.gradient(flat), groups, scale)
        host.deliver(flat)

    @torch.no_grad()
    def step(self, gradient: torch.Tensor, groups: Sequence[Hyper], scale: float) -> None:
        """New masters; `gradient` (state range,) is scaled in place."""
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
        self.ledger.add("optimizer", held - self._held, offloaded=self.flat.home.offloaded)
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
