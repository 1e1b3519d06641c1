"""Activation offload on a GPU: the same bits, also when copies are slower than the computation, less memory on the
device, and page-locked memory on the host."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.config.presets import GPTConfig
from runtime.host.ledger import Ledger
from runtime.models.activations import offload_activations
from runtime.models.gpt import GPT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def model(layers: int, dim: int) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(layers, 8, dim, 1024, 1024)).cuda().bfloat16()


def train(of: GPT, rows: int) -> list[torch.Tensor]:
    """Gradients of two micro-batches, of different lengths."""
    for length in (1024, 768):
        tokens = torch.randint(1024, (rows, length), generator=torch.Generator().manual_seed(length)).cuda()
        with sdpa_kernel(SDPBackend.MATH):  # the backward of the others sums in any order
            of(tokens, tokens).backward()
    found = [parameter.grad.clone() for parameter in of.parameters() if parameter.grad is not None]
    of.zero_grad()
    return found


# Narrow blocks compute for less time than their copies take; wide ones for more.
@pytest.mark.parametrize(("layers", "dim", "rows"), [(8, 64, 16), (6, 1024, 4)])
def test_the_same_bits(layers: int, dim: int, rows: int) -> None:
    of = model(layers, dim)
    plain = train(of, rows)
    offload_activations(list(of.blocks), min_bytes=1)
    for _ in range(5):
        for mine, theirs in zip(train(of, rows), plain, strict=True):
            assert torch.equal(mine, theirs)


def test_less_memory_on_the_device_and_page_locked_memory_on_the_host() -> None:
    of, ledger = model(12, 512), Ledger()

    def peak() -> int:
        train(of, 8)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(of, 8)
        return torch.cuda.max_memory_allocated() - before

    plain = peak()
    offload = offload_activations(list(of.blocks), ledger=ledger)
    assert peak() < plain / 2
    slabs = next(slabs for _, slabs in offload._places.values())
    assert slabs.take(1000).tensor.is_pinned()
    assert ledger.offloaded()["activations"] == slabs.held_bytes == ledger.pinned()[0]
    slabs_used = slabs.used_bytes
    assert slabs_used == 0
