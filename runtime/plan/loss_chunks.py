"""How cross-entropy in chunks (runtime/models/cross_entropy.py) cuts the tokens, and the memory it takes. Torch-free.

[Note: memory of the chunks]
Whole logits take at least 10 bytes per token and word of the vocabulary in 16 bits, and 12 in fp32: logits, fp32
log-softmax and its gradient. Everything that cross-entropy in chunks needs beside the gradients themselves, which plain
autograd has, too, takes at most an eighth of that:

- a chunk's logits, in the model's dtype and in fp32 (6 bytes; 4 in fp32; 4 more with a softcap).
- for a weight in 16 bits an fp32 sum of its gradient over the chunks, rounded once at the end, if it takes at most half
  of that memory. With its 4 bytes per element of the weight it does so from 6.4 tokens per hidden dimension on. With
  fewer tokens the sum is in 16 bits, but then the chunks are as large as they may be: there are 5, with a softcap 9,
  and as many roundings.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 8
"""The chunks take at most one part in so many of the memory of whole logits."""
CHUNK_ELEMENTS = 1 << 25
MIN_CHUNK_TOKENS = 1024
"""Unless the share is smaller, a chunk has so many logits or tokens, whichever is more. With fewer tokens a matrix
product would take less time than reading and writing the gradient of the weight."""


@dataclass(frozen=True)
class Chunks:
    """How the tokens are cut."""

    tokens: int
    """Tokens per chunk, at most."""
    fp32_sum: bool
    """Whether the weight's gradient is summed over the chunks in fp32."""


def cut_tokens(
    tokens: int, vocab: int, dim: int, element_bytes: int, *, weight_grad: bool = True, softcap: bool = False
) -> Chunks:
    """How many tokens a chunk has by default. See [Note: memory of the chunks]."""
    sixteen_bits = element_bytes < 4
    share = whole_logits_bytes(tokens, vocab, element_bytes) // SHARE
    of_token = vocab * _logit_bytes(element_bytes, softcap) + 3 * dim * element_bytes
    wanted = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // vocab)
    fp32_sum = False
    if weight_grad and sixteen_bits:
        of_sum = 4 * vocab * dim
        fp32_sum = of_sum <= share // 2
        if fp32_sum:
            share -= of_sum
        else:
            wanted = tokens
    chunk = max(1, min(tokens, wanted, share // of_token))
    return Chunks(chunk, fp32_sum and chunk < tokens)


def _logit_bytes(element_bytes: int, softcap: bool) -> int:
    return (6 if element_bytes < 4 else 4) + 4 * softcap


def whole_logits_bytes(tokens: int, vocab: int, element_bytes: int) -> int:
    """Bytes held when backward starts: logits in the model's precision, their log-softmax and its gradient in fp32."""
    return tokens * vocab * (element_bytes + 4 + 4)


def chunked_logits_bytes(
    tokens: int, vocab: int, dim: int, element_bytes: int, *, weight_grad: bool = True, softcap: bool = False
) -> int:
    """Most bytes that cross-entropy in chunks holds beside the gradients of hidden states and weight."""
    cut = cut_tokens(tokens, vocab, dim, element_bytes, weight_grad=weight_grad, softcap=softcap)
    of_token = vocab * _logit_bytes(element_bytes, softcap) + 3 * dim * element_bytes
    return cut.tokens * of_token + 4 * vocab * dim * cut.fp32_sum
