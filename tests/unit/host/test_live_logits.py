"""Logits are counted for as long as something holds their memory, and no longer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from runtime.config.presets import GPTConfig
from runtime.host.live_logits import LiveTensors, logits
from runtime.models.cross_entropy import chunked_cross_entropy, whole_cross_entropy
from runtime.models.gpt import GPT

VOCAB, TOKENS = 512, 32


def test_a_tensor_counts_once_until_its_memory_is_freed() -> None:
    live = LiveTensors()
    tensor = torch.zeros(100)
    assert live.note(tensor) is tensor
    live.note(tensor.view(10, 10)[2:])
    assert (live.nbytes(), live.most_bytes) == (400, 400)
    other = live.note(torch.zeros(50))
    assert (live.nbytes(), live.most_bytes) == (600, 600)
    kept = tensor[3:4]
    del tensor
    assert live.nbytes() == 600  # a view holds all of it
    del kept, other
    assert (live.nbytes(), live.most_bytes) == (0, 600)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 1)])
def test_whole_logits_of_the_built_in_model_live_from_forward_to_backward(dtype: torch.dtype, copies: int) -> None:
    model = GPT(GPTConfig(1, heads=2, dim=16, vocab_size=VOCAB, max_seq_len=TOKENS)).to(dtype)
    tokens = torch.randint(VOCAB, (2, TOKENS))
    loss = model(tokens, tokens)
    assert logits.nbytes() == copies * 4 * 2 * TOKENS * VOCAB  # the log-softmax in fp32, which backward needs
    loss.backward()
    assert logits.nbytes() == 0
    with torch.no_grad():
        model(tokens, tokens)
    assert logits.nbytes() == 0


def test_of_logits_in_chunks_one_chunk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = LiveTensors()
    monkeypatch.setattr("runtime.models.cross_entropy.live_logits", fresh)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    total = chunked_cross_entropy(hidden, weight, torch.randint(VOCAB, (64,)), chunk_tokens=16)
    assert (fresh.nbytes(), fresh.most_bytes) == (0, 16 * VOCAB * 4)
    total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_whole_logits_has_the_bits_of_torchs(dtype: torch.dtype) -> None:
    ours = torch.randn(TOKENS, VOCAB, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[::3] = -100
    mine = whole_cross_entropy(ours, targets)
    plain = F.cross_entropy(theirs.float(), targets, ignore_index=-100, reduction="sum")
    mine.backward()
    plain.backward()
    assert torch.equal(mine, plain) and ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
