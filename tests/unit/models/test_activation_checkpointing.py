"""Activation checkpointing: the same gradients from less memory, in the built-in model and in DeepSpeed's calls."""

from __future__ import annotations

import pytest
import torch

import runtime as deepspeed
from runtime.config.presets import GPTConfig
from runtime.models.gpt import GPT

SHAPE = GPTConfig(layers=4, heads=2, dim=32, vocab_size=64, max_seq_len=16)


def run(segments: int | None, on: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the forward saved for backward, and the gradients."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    if on:
        model.checkpoint_activations(segments)
    tokens = torch.arange(32).view(2, 16) % 64
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    loss.backward()
    return sum(saved.values()), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("segments", [None, 2, 1])
def test_the_built_in_model(segments: int | None) -> None:
    plain_bytes, plain = run(None, on=False)
    less_bytes, ours = run(segments, on=True)
    assert less_bytes < plain_bytes / 2
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.equal(mine, theirs)


def test_deepspeeds_calls() -> None:
    checkpointing = deepspeed.checkpointing
    assert not checkpointing.is_configured()
    checkpointing.configure(
        None, deepspeed_config={"train_batch_size": 1, "activation_checkpointing": {}}, num_checkpoints=2
    )
    assert checkpointing.is_configured()
    x = torch.ones(3, requires_grad=True)
    y = checkpointing.checkpoint(lambda value, factor: (value * factor).exp().sum(), x, 2.0)
    y.backward()
    assert torch.allclose(x.grad, 2.0 * torch.full((3,), 2.0).exp())
    checkpointing.reset()
    assert not checkpointing.is_configured()
