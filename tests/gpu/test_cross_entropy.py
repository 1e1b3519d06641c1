"""The cross-entropy in chunks on a GPU: products in the model's dtype, the sum of the weight's gradient in fp32 or not,
an eighth of the memory, and Liger's kernel where it is installed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.models.cross_entropy import chunked_cross_entropy, cut_tokens, liger_cross_entropy, liger_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
VOCAB = 32_000


def material(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, dim, device="cuda") * 0.1).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), device="cuda")
    targets[::3] = -100
    return hidden, weight, targets


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")


def distance(values: torch.Tensor, exact: torch.Tensor) -> float:
    return float((values.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("tokens", "dim", "fp32_sum"), [(2048, 128, True), (2048, 1024, False)])
def test_equals_whole_logits_in_an_eighth_of_the_memory(tokens: int, dim: int, fp32_sum: bool) -> None:
    hidden, weight, targets = material(tokens, dim)
    assert cut_tokens(int((targets != -100).sum()), VOCAB, dim, 2).fp32_sum == fp32_sum
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = torch.autograd.grad(whole(*exact_inputs, targets), exact_inputs)
    found, peaks = [], []
    for loss in (whole, chunked_cross_entropy):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total = loss(hidden, weight, targets)
        gradients = torch.autograd.grad(total, (hidden, weight))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        found.append((total.item(), [distance(*pair) for pair in zip(gradients, exact, strict=True)]))
        del total, gradients
    (plain_total, plain_off), (total, off) = found
    assert total == pytest.approx(plain_total, rel=1e-4)
    assert all(mine < 1.5 * theirs + 2e-3 for mine, theirs in zip(off, plain_off, strict=True))
    of_gradients = 2 * (hidden.numel() + weight.numel())
    assert peaks[1] - of_gradients <= peaks[0] / 8


@pytest.mark.skipif(liger_problem(torch.device("cuda")) is not None, reason="needs liger-kernel")
@pytest.mark.parametrize("variant", [{}, {"scale": 0.5}, {"softcap": 30.0}], ids=str)
def test_liger_gives_the_same(variant: dict[str, float]) -> None:
    hidden, weight, targets = material(2048, 256)
    ours, theirs = (loss(hidden, weight, targets, **variant) for loss in (chunked_cross_entropy, liger_cross_entropy))
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-3)
    pairs = [torch.autograd.grad(total, (hidden, weight)) for total in (ours, theirs)]
    for mine, other in zip(*pairs, strict=True):
        assert distance(other, mine.double()) < 0.02
