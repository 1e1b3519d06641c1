"""Cross-entropy over a large vocabulary in chunks of tokens: the logits never exist as a whole.

forward    for each chunk of counted tokens: logits | sum of cross-entropies | gradient of the logits, in their memory |
           gradients of the hidden states and of the weight
backward   multiplies these gradients by the gradient of the sum

The gradients can be computed in the forward because the result is a sum: that of a chunk does not depend on the others.
The weight is not needed in the backward, so at stage 3 it need not be all-gathered again.

How the tokens are cut, and what the chunks take: runtime/plan/loss_chunks.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from runtime.host.live_logits import logits as live_logits
from runtime.plan.loss_chunks import Chunks, cut_tokens

IGNORED_TARGET = -100
"""Target of tokens that do not count in the loss."""
SLICE_ELEMENTS = 1 << 19
"""Weights and gradients are converted to fp32 in slices of so many elements."""


def whole_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of the counted targets, an fp32 scalar, from whole logits.

    Args:
        logits: (tokens, vocab) of any floating-point dtype.
        targets: (tokens,) int64; -100 does not count.
    """
    live_logits.note(logits)
    probabilities = live_logits.note(F.log_softmax(live_logits.note(logits.float()), dim=1))
    return F.nll_loss(probabilities, targets, ignore_index=IGNORED_TARGET, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    counted: int | None = None,
) -> Tensor:
    """The sum of the cross-entropies of the counted targets, an fp32 scalar.

    The logits are scale * (hidden @ weight.T + bias), and with a softcap (Gemma 2, arXiv 2408.00118) softcap *
    tanh(logits / softcap). Matrix products are in the model's dtype on a GPU, all else is in fp32.

    Args:
        hidden: (tokens, dim) output of the model's last norm.
        weight: (vocab, dim) of the head, perhaps the embedding's.
        targets: (tokens,) int64; tokens whose target is -100 do not count and take no time.
        bias: (vocab,) of the head.
        chunk_tokens: tokens whose logits exist at a time; None: see `cut_tokens`.
        counted: number of targets that are not -100, if the caller knows it. Otherwise the device is asked, and on a
            GPU the host waits for it.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            "expected hidden (tokens, dim), weight (vocab, dim) and targets (tokens,), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if counted is None:
        counted = int((targets != IGNORED_TARGET).sum())
    wants_grad = torch.is_grad_enabled()
    cut = cut_tokens(
        counted,
        weight.shape[0],
        weight.shape[1],
        weight.element_size(),
        weight_grad=wants_grad and weight.requires_grad,
        softcap=softcap is not None,
    )
    if chunk_tokens is not None:
        cut = Chunks(max(1, chunk_tokens), cut.fp32_sum)
    hidden = hidden.to(weight.dtype)
    total: Tensor = _Function.apply(hidden, weight, bias, targets, scale, softcap, cut, counted, wants_grad)
    return total


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        cut: Chunks,
        counted: int,
        wants_grad: bool,
    ) -> Tensor:
        # At stage 3 this all-gathers the weight, also on ranks without counted targets: all ranks must take part.
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        hidden_grad, weight_grad, bias_grad = (wants_grad and ctx.needs_input_grad[i] for i in range(3))
        gradients = _Gradients(hidden, weight, hidden_grad, weight_grad, bias_grad, cut.fp32_sum)
        chosen = None
        if counted < targets.numel():  # a stable sort, because nonzero() would make the host wait for a GPU
            chosen = (targets == IGNORED_TARGET).to(torch.uint8).argsort(stable=True)[:counted]
            targets = targets[chosen]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = -(-counted // cut.tokens)
        for chunk in range(chunks):  # of nearly equal sizes
            start, end = counted * chunk // chunks, counted * (chunk + 1) // chunks
            rows = slice(start, end) if chosen is None else chosen[start:end]
            h = hidden[rows]
            logits = live_logits.note(_logits(h, weight, bias))
            gradient = _sum_and_gradient(logits, targets[start:end], scale, softcap, total, gradients.wanted)
            if gradient is not None:
                gradients.add(gradient, h, rows)
            del logits, gradient  # before the next chunk's
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        # A backward that keeps the graph may come back for the same gradients.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        return (
            _multiplied(hidden, factor, ctx.dtype, in_place),
            _multiplied(weight, factor, ctx.dtype, in_place),
            _multiplied(bias, factor, ctx.dtype, in_place),
            *(None,) * 6,
        )


class _Gradients:
    """The gradients of hidden states, weight and bias, as far as they are wanted."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool, of_bias: bool, fp32_sum: bool
    ) -> None:
        sum_dtype = torch.float32 if fp32_sum else weight.dtype
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
        self.weight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device) if of_weight else None
        self.bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if of_bias else None
        self.wanted = of_hidden or of_weight or of_bias
        self._head = weight

    def add(self, gradient: Tensor, h: Tensor, rows: slice | Tensor) -> None:
        """Add a chunk's part. gradient: (chunk, vocab) of the logits before `scale`; h: (chunk, dim) hidden states of
        `rows`."""
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=torch.float32)
        if gradient.dtype != self._head.dtype:
            self._add_in_fp32(gradient, h.float(), rows)
            return
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(gradient, self._head)
        if self.weight is None:
            return
        if self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.t(), h)
        elif torch.cuda.get_device_capability(gradient.device)[0] >= 8:
            torch.addmm(self.weight, gradient.t(), h, out_dtype=torch.float32, out=self.weight)  # type: ignore[call-overload]
        else:
            for part in _slices(self.weight):
                self.weight[part] += torch.mm(gradient[:, part].t(), h)

    def _add_in_fp32(self, gradient: Tensor, h: Tensor, rows: slice | Tensor) -> None:
        hidden = torch.zeros_like(h)
        for part in _slices(self._head):
            if self.hidden is not None:
                hidden.addmm_(gradient[:, part], self._head[part].float())
            if self.weight is not None:
                self.weight[part] += torch.mm(gradient[:, part].t(), h)
        if self.hidden is not None:
            self.hidden[rows] = hidden.to(self.hidden.dtype)


def _logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h @ weight.T + bias, (chunk, vocab).

    In fp32 on a CPU: a product of 16-bit matrices may take 100 times as long there, if it has no instructions for them.
    """
    if h.device.type != "cpu" or weight.dtype == torch.float32:
        return torch.mm(h, weight.t()) if bias is None else torch.addmm(bias.to(h.dtype), h, weight.t())
    h = h.float()
    logits = torch.empty(h.shape[0], weight.shape[0])
    for part in _slices(weight):
        torch.mm(h, weight[part].float().t(), out=logits[:, part])
    return logits if bias is None else logits.add_(bias)


def _sum_and_gradient(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, total: Tensor, wants_grad: bool
) -> Tensor | None:
    """Add the cross-entropies of `targets` to `total`. Returns the gradient of `logits`, (chunk, vocab), in their
    memory, if it is wanted."""
    x = live_logits.note(logits.float())  # a copy, unless the model is in fp32
    targets = targets.unsqueeze(1)
    if scale != 1.0:
        x *= scale
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        slope = x.square().neg_().add_(1.0) if wants_grad else None
        x *= softcap
    x -= x.amax(1, keepdim=True)
    own = x.gather(1, targets)
    sums = x.exp_().sum(1, keepdim=True)
    total += (sums.log() - own).sum()
    if not wants_grad:
        return None
    x /= sums
    x.scatter_add_(1, targets, x.new_full((1, 1), -1.0).expand_as(targets))
    if slope is not None:
        x *= slope
    if scale != 1.0:
        x *= scale
    return logits.copy_(x) if x is not logits else logits


def _slices(matrix: Tensor) -> list[slice]:
    rows = max(1, SLICE_ELEMENTS // max(1, matrix[0].numel() if matrix.numel() else 1))
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def _multiplied(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor | None:
    """`gradient` times the scalar `factor` in fp32, then rounded to `dtype`; in the same memory if it may be."""
    if gradient is None:
        return None
    if gradient.dtype == dtype == torch.float32:
        return gradient.mul_(factor) if in_place else gradient * factor
    result = gradient if in_place and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    for part in _slices(gradient):  # a 16-bit factor would be off by up to 0.4%
        result[part] = gradient[part].float() * factor
    return result


# ---- Liger -----------------------------------------------------------------------------------------------------------
def liger_problem(device: torch.device) -> str | None:
    """Why Liger's kernel can't be used on `device`; None if it can."""
    if device.type != "cuda":
        return f"it needs a GPU, and this model is on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install liger-kernel)"
    return None


def liger_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`chunked_cross_entropy` by Liger's fused kernel (liger-kernel 0.6.3 or newer), which has chunks, too.

    Raises RuntimeError if it can't be used on this device.
    """
    if problem := liger_problem(hidden.device):
        raise RuntimeError(f"Liger's cross-entropy is not available: {problem}")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if scale != 1.0:  # Liger has no factor on the logits
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    cut = cut_tokens(hidden.shape[0], weight.shape[0], weight.shape[1], weight.element_size())
    accumulate = torch.float32 if cut.fp32_sum or weight.dtype == torch.float32 else None
    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED_TARGET, reduction="sum", softcap=softcap, accum_dtype=accumulate
    )
    total: Tensor = loss(weight, hidden, targets, bias)
    return total.float()
