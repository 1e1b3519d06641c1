"""What every peer trains: one small GPT on the text of Python's own standard library, byte by byte."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 1234
VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """The shape of the model and of one optimizer step: `accumulation` micro-batches of (micro_batch x seq) tokens."""

    layers: int
    width: int
    heads: int
    seq: int
    micro_batch: int
    accumulation: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one rank."""
        return self.accumulation * self.micro_batch * self.seq


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, width) -> the same."""
        batch, seq, width = x.shape
        shape = (batch, seq, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(batch, seq, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class GPT(nn.Module):
    """Returns the loss itself, in fp32, so that every peer computes the same thing."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.seq, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        residual_scale = 1 / math.sqrt(2 * size.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 * (residual_scale if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Two (batch, seq) int64 tensors -> the mean cross entropy in nats."""
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().view(-1, VOCABULARY), targets.reshape(-1))


class Batches:
    """Random windows of the text: a function of rank, step and micro-step alone, so the same for every peer."""

    def __init__(self, size: Size, rank: int) -> None:
        self._size, self._rank = size, rank
        self._text = _standard_library()

    def __call__(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-byte targets, each (micro_batch, seq) int64."""
        size = self._size
        generator = torch.Generator().manual_seed((step * 1000 + micro_step) * 64 + self._rank)
        starts = torch.randint(len(self._text) - size.seq - 1, (size.micro_batch,), generator=generator)
        windows = torch.stack([self._text[start : start + size.seq + 1] for start in starts]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _standard_library() -> Tensor:
    """Every top-level .py file of the standard library, one after the other: (bytes,) uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
    return torch.frombuffer(text, dtype=torch.uint8)
