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
from torch.optim import adamw as functional_adamw  # type: ignore[attr-defined]

from runtime import native
from runtime.memory import Ledger, zeros
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
    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        """Take optimizer step `step` (from 1) with gradient x `scale`, and leave the new values in masters and own
        parameters."""

    def states(self) -> Iterator[State]:
        """Every state tensor, to be written to or read from a checkpoint."""

    def scalars(self) -> dict[int, dict[str, Any]]:
        """States that are not per element, by parameter group; a rank knows those of the groups in its range."""

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None: ...


class AdamRule:
    """AdamW (arXiv 1711.05101) or Adam with L2, fp32 moments over the whole state range."""

    def __init__(self, flat: Flat, decoupled: bool, bias_correction: bool, ledger: Ledger) -> None:
        self.flat, self.decoupled, self.bias_correction = flat, decoupled, bias_correction
        self.exp_avg = ledger.hold("optimizer", zeros(flat.state_numel, torch.float32, flat.masters.device))
        self.exp_avg_sq = ledger.hold("optimizer", zeros(flat.state_numel, torch.float32, flat.masters.device))

    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        flat = self.flat
        # The kernels write bf16 beside the masters; fp16 is rounded in a pass of its own.
        out = flat.own_parameters if flat.dtype == torch.bfloat16 else None
        for segment in flat.segments:
            part = slice(segment.start, segment.end)
            hyper = groups[segment.group]
            beta1, beta2 = hyper["betas"]
            _adam_kernel(flat.masters, flat.gradient.dtype)(
                flat.masters[part],
                self.exp_avg[part],
                self.exp_avg_sq[part],
                flat.gradient[part],
                None if out is None else out[part],
                # Without bias correction both terms are 1, which is what they tend to.
                step=step if self.bias_correction else 2**40,
                lr=float(hyper["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=hyper["eps"],
                weight_decay=hyper["weight_decay"],
                grad_scale=scale,
                adamw=self.decoupled,
            )
        if out is None:
            flat.masters_to_parameters()

    def states(self) -> Iterator[State]:
        yield State("exp_avg", 0, self.exp_avg)
        yield State("exp_avg_sq", 0, self.exp_avg_sq)

    def scalars(self) -> dict[int, dict[str, Any]]:
        return {}

    def load_scalars(self, scalars: dict[int, dict[str, Any]]) -> None:
        """Nothing to take: Adam's only scalar is the step count, which the engine keeps."""


def _adam_kernel(masters: torch.Tensor, gradient: torch.dtype):  # type: ignore[no-untyped-def]
    if masters.device.type == "cuda":
        return _adam_on_cuda
    fused = native.available() and gradient in (torch.float32, torch.bfloat16)
    return partial(native.adamw, threads=torch.get_num_threads()) if fused else adamw_reference


def _adam_on_cuda(p, m, v, g, out, *, step, lr, beta1, beta2, eps, weight_decay, grad_scale, adamw):  # type: ignore[no-untyped-def]
    """torch's own fused kernel, over one segment."""
    if not adamw:
        adamw_reference(
            p,
            m,
            v,
            g,
            out,
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
            adamw=False,
        )
        return
    grad = g.mul_(grad_scale) if g.dtype == torch.float32 else g.float().mul_(grad_scale)
    functional_adamw.adamw(
        [p], [grad], [m], [v], [], [torch.full((), float(step - 1), device=p.device)],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip
    if out is not None:
        out.copy_(p)


class TorchRule:
    """Any elementwise optimizer of torch.optim, unchanged, over segments of the masters."""

    def __init__(
        self, flat: Flat, kind: Callable[..., torch.optim.Optimizer], groups: Sequence[Hyper], ledger: Ledger
    ) -> None:
        self.flat, self.ledger = flat, ledger
        self.parts = [nn.Parameter(flat.masters[s.start : s.end], requires_grad=True) for s in flat.segments]
        self.optimizer = kind(
            [
                {"params": [part], **{k: v for k, v in groups[s.group].items() if k != "params"}}
                for part, s in zip(self.parts, flat.segments, strict=True)
            ]
            or [{"params": [nn.Parameter(torch.zeros(0))]}]
        )
        self._held = 0

    def update(self, groups: Sequence[Hyper], step: int, scale: float) -> None:
        flat = self.flat
        flat.gradient.mul_(scale)
        for part, segment, own in zip(self.parts, flat.segments, self.optimizer.param_groups, strict=False):
            part.grad = flat.gradient[segment.start : segment.end].to(torch.float32)
            own.update({k: v for k, v in groups[segment.group].items() if k in own and k != "params"})
        self.optimizer.step()
        for part in self.parts:
            part.grad = None
        self._account()
        flat.masters_to_parameters()

    def _account(self) -> None:
        held = sum(state.tensor.numel() * state.tensor.element_size() for state in self.states())
        self.ledger.add("optimizer", held - self._held)
        self._held = held

    def prepare(self) -> None:
        """Make the states exist (torch makes them in the first step), so that a checkpoint can be read into them."""
        kept = self.flat.masters.clone()
        for part in self.parts:
            part.grad = torch.zeros_like(part)
        self.optimizer.step()
        for part in self.parts:
            part.grad = None
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


def _per_element(value: Any, part: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == part.shape
