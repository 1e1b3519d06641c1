"""The cross-entropy in chunks is that of whole logits, value and gradients, in an eighth of their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.models import cross_entropy
from runtime.models.cross_entropy import (
    chunked_cross_entropy,
    liger_cross_entropy,
    liger_problem,
)
from runtime.plan.loss_chunks import cut_tokens
from tests.harness.peak_bytes import peak_bytes

TOKENS, DIM, VOCAB = 61, 16, 101
VARIANTS: list[dict[str, Any]] = [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0}]


def whole(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def material(dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets, torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_() if bias else None


def gradients(total: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(total * 0.37, [tensor for tensor in inputs if tensor is not None]))


def distance(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 7, 1000])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_fp32_equals_whole_logits(variant: dict[str, Any], chunk_tokens: int | None, bias: bool) -> None:
    hidden, weight, targets, of_bias = material(torch.float32, bias)
    plain = whole(hidden, weight, targets, of_bias, **variant)
    ours = chunked_cross_entropy(hidden, weight, targets, bias=of_bias, chunk_tokens=chunk_tokens, **variant)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(
        gradients(ours, hidden, weight, of_bias), gradients(plain, hidden, weight, of_bias), strict=True
    ):
        assert distance(mine, theirs) < 1e-6


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in the model's dtype."""
    monkeypatch.setattr(cross_entropy, "_logits", F.linear)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))


@pytest.mark.parametrize("products", ["fp32", "16 bits"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bits_are_as_near_to_the_exact_result_as_whole_logits(
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    variant: dict[str, Any],
    chunk_tokens: int | None,
    products: str,
) -> None:
    if products == "16 bits":
        request.getfixturevalue("as_on_a_gpu")
    hidden, weight, targets, bias = material(dtype)
    assert bias is not None
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = whole(exact_inputs[0], exact_inputs[1], targets, exact_inputs[2], **variant)
    plain = whole(hidden, weight, targets, bias, **variant)
    ours = chunked_cross_entropy(hidden, weight, targets, bias=bias, chunk_tokens=chunk_tokens, **variant)
    rounding = torch.finfo(dtype).eps
    assert ours.item() == pytest.approx(exact.item(), rel=rounding)
    of_exact = gradients(exact, *exact_inputs)
    of_plain, of_ours = (gradients(total, hidden, weight, bias) for total in (plain, ours))
    for mine, theirs, true in zip(of_ours, of_plain, of_exact, strict=True):
        assert mine.dtype == dtype
        assert distance(mine, true) < 1.5 * distance(theirs, true) + rounding / 2


@pytest.mark.parametrize("products", ["fp32", "16 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_default_chunks_sum_the_weights_gradient_to_rounding(
    request: pytest.FixtureRequest, dtype: torch.dtype, products: str
) -> None:
    """Several chunks of the default size; in bf16 once with an fp32 sum and once without."""
    if products == "16 bits":
        request.getfixturevalue("as_on_a_gpu")
    for tokens, dim, fp32_sum in ((400, 8, True), (400, 256, False)):
        cut = cut_tokens(tokens, 2000, dim, dtype.itemsize)
        hidden, weight = torch.randn(tokens, dim).to(dtype), (torch.randn(2000, dim) * 0.1).to(dtype).requires_grad_()
        targets = torch.randint(2000, (tokens,))
        assert cut.tokens < tokens / 2 and cut.fp32_sum == (fp32_sum and dtype != torch.float32)
        exact_weight = weight.detach().double().requires_grad_()
        exact = gradients(whole(hidden.double(), exact_weight, targets, None), exact_weight)[0]
        plain = gradients(whole(hidden, weight, targets, None), weight)[0]
        ours = gradients(chunked_cross_entropy(hidden, weight, targets), weight)[0]
        assert distance(ours, exact) < (1.2 if fp32_sum else 2.0) * distance(plain, exact)


def test_no_counted_target_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets, bias = material(torch.bfloat16)
    total = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), bias=bias)
    assert total.item() == 0 and total.requires_grad
    for gradient in gradients(total, hidden, weight, bias):
        assert gradient.dtype == torch.bfloat16 and not gradient.any()


def test_ignored_tokens_have_no_gradient_and_may_hold_anything() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    with torch.no_grad():
        hidden[targets == -100] = torch.nan
    gradient, of_weight = gradients(chunked_cross_entropy(hidden, weight, targets), hidden, weight)
    assert not gradient[targets == -100].any() and gradient[targets != -100].all()
    assert of_weight.isfinite().all()


def test_a_known_count_changes_nothing() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    counted = int((targets != -100).sum())
    asked, told = (chunked_cross_entropy(hidden, weight, targets, counted=count) for count in (None, counted))
    assert torch.equal(asked, told)
    for one, other in zip(gradients(asked, hidden, weight), gradients(told, hidden, weight), strict=True):
        assert torch.equal(one, other)


def test_a_backward_that_keeps_the_graph_can_be_repeated() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    total = chunked_cross_entropy(hidden, weight, targets) * 3
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=keep) for keep in (True, False))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, weight, torch.full_like(targets, VOCAB))


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    with pytest.raises(ValueError, match=r"hidden \(tokens, dim\).*got \(61, 16\), \(101, 16\) and \(60,\)"):
        chunked_cross_entropy(hidden, weight, targets[1:])


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [16, 256], ids=["fp32 sum", "16-bit sum"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_eighth_of_whole_logits_memory(dtype: torch.dtype, softcap: float | None, dim: int) -> None:
    tokens, vocab = 512, 32_000
    hidden = torch.randn(tokens, dim).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (tokens,))
    of_gradients = (hidden.numel() + weight.numel()) * dtype.itemsize
    # The memory of whole logits does not depend on dim; bf16 products of any size take a minute on some CPUs.
    inputs = [tensor[:, :1].detach().requires_grad_() for tensor in (hidden, weight)]
    plain = peak_bytes(lambda: whole(*inputs, targets, None).backward())
    ours = peak_bytes(lambda: chunked_cross_entropy(hidden, weight, targets, softcap=softcap).backward()) - of_gradients
    assert plain >= 10 * tokens * vocab
    assert ours <= plain / 8, f"{ours / plain:.3f} of {plain}"


def test_a_frozen_weight_has_no_gradient_memory_and_evaluation_none_at_all() -> None:
    hidden, weight = torch.randn(64, 512).requires_grad_(), torch.randn(4096, 512)
    targets = torch.randint(4096, (64,))
    of_weight = weight.numel() * 4

    def train() -> None:
        chunked_cross_entropy(hidden, weight, targets, chunk_tokens=8).backward()

    def evaluate() -> None:
        with torch.no_grad():
            chunked_cross_entropy(hidden, weight.requires_grad_(), targets, chunk_tokens=8)

    assert peak_bytes(train) < of_weight / 4
    assert peak_bytes(evaluate) < 1.2 * 8 * 4096 * 4


def test_chunks_of_a_7b_model_and_of_a_long_context() -> None:
    short, long = (cut_tokens(tokens, 128_256, 4096, 2) for tokens in (4096, 65_536))
    assert not short.fp32_sum and 4096 / short.tokens < 10
    assert long.fp32_sum and long.tokens == 1024
    assert cut_tokens(65_536, 128_256, 4096, 2, weight_grad=False).fp32_sum is False


# ---- Liger -----------------------------------------------------------------------------------------------------------
def test_liger_says_why_it_is_not_available() -> None:
    hidden, weight, targets, _ = material(torch.float32)
    assert liger_problem(torch.device("cpu")) == "it needs a GPU, and this model is on cpu"
    assert "pip install liger-kernel" in (liger_problem(torch.device("cuda")) or "")
    with pytest.raises(RuntimeError, match="Liger's cross-entropy is not available: it needs a GPU"):
        liger_cross_entropy(hidden, weight, targets)
