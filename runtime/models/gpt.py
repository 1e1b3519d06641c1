"""The built-in GPT: pre-norm, rotary positions, no biases, no dropout; its blocks are the engine's units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.checkpointing import keep_inputs_only
from runtime.config.presets import GPTConfig, ModelError, load_model_config
from runtime.models.cross_entropy import IGNORED_TARGET, whole_cross_entropy


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)). Shapes: [batch, seq_len, dim] in and out."""

    def __init__(self, config: GPTConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim, bias=False, device=device)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device)
        self.attention_out = nn.Linear(dim, dim, bias=False, device=device)
        self.feed_norm = nn.LayerNorm(dim, bias=False, device=device)
        self.feed_in = nn.Linear(dim, 4 * dim, bias=False, device=device)
        self.feed_out = nn.Linear(4 * dim, dim, bias=False, device=device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, seq_len, dim]; cos, sin: [seq_len, head_dim / 2]."""
        batch, seq_len, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, seq_len, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        v = v.contiguous()  # a view would keep all of qkv alive until backward: 2 * dim more per token
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, seq_len, dim))
        return x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer. The head is tied to the embedding when the config says so (see presets.py)."""

    def __init__(self, config: GPTConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, device=device)
        self.blocks = nn.ModuleList(Block(config, device) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim, bias=False, device=device)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False, device=device)
        if config.tied:
            self.head.weight = self.embedding.weight
        # Not a buffer: model.to(bfloat16) must not round the angles, and meta models must not lose them.
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._segments: list[list[Block]] | None = None
        self._on_cpu = False
        self.reset_parameters()

    def checkpoint_activations(self, segments: int | None = None, on_cpu: bool = False) -> None:
        """Recompute the blocks' activations in backward, in `segments` groups of blocks (default: one per block).
        on_cpu: keep the groups' inputs in host memory."""
        blocks: list[Block] = list(self.blocks)  # type: ignore[arg-type]
        size = -(-len(blocks) // min(segments or len(blocks), len(blocks)))
        self._segments = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        self._on_cpu = on_cpu

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, 0.02); projections into the residual stream are divided by sqrt(2 * layers), norms are one."""
        residual_std = 0.02 / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                into_residual = name.endswith(("attention_out.weight", "feed_out.weight"))
                parameter.normal_(0.0, residual_std if into_residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in fp32 over targets that are not -100; without targets the logits.

        `tokens` and `targets` are int64 [batch, seq_len]. If no target counts, the loss is 0, with zero
        gradients.
        """
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"{tokens.shape[1]} tokens in a sequence; the model was built for {self.config.max_seq_len}"
            )
        cos, sin = self._rotary_tables(tokens.device, tokens.shape[1])
        x = self.embedding(tokens)
        if self._segments is None or not torch.is_grad_enabled():
            x = _through(self.blocks, x, cos, sin)
        else:
            for segment in self._segments:
                x = keep_inputs_only(_through, segment, x, cos, sin, on_cpu=self._on_cpu)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        total = whole_cross_entropy(logits.flatten(0, 1), targets.flatten())
        return total / (targets != IGNORED_TARGET).sum().clamp(min=1)

    def _rotary_tables(self, device: torch.device, seq_len: int) -> tuple[Tensor, Tensor]:
        if self._rotary is None or self._rotary[0].device != device:
            self._rotary = rotary_tables(self.config.max_seq_len, self.config.dim // self.config.heads, device)
        cos, sin = self._rotary
        return cos[:seq_len], sin[:seq_len]


def _through(blocks: Iterable[nn.Module], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, cos, sin)
    return x


def rotary_tables(seq_len: int, head_dim: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """cos and sin of position * 10000^(-2i/head_dim), fp32 [seq_len, head_dim / 2] (arXiv 2104.09864)."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), rates)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim/2]) of [batch, heads, seq_len, head_dim] by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def build_model(section: Any, vocab_size: int, seq_len: int, device: torch.device | str) -> GPT:
    """The model of a `zerotop.model` section in fp32 on `device`, drawn from torch's current random state.

    `vocab_size` is the tokenizer's number of tokens (padded to 64 here). Raises ModelError when it cannot be built.
    """
    return GPT(load_model_config(section, vocab_size, seq_len), device)


__all__ = ["GPT", "Block", "ModelError", "build_model", "rotary_tables"]
