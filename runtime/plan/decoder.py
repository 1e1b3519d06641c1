"""Estimates of the activations of Hugging Face decoders such as Llama and Qwen3, from their shape. Torch-free.

What autograd keeps of one block per token, with `e` bytes per element, was read off transformers' modules (5.x):

norms       their input in fp32, one number each, and the normalized input (for the weight's gradient); LayerNorm
            its input and two numbers
linear      the input of q, k, v, of gate and up, and of down, each as far as a weight or an adapter that reads it is
            trained; the input of o_proj is attention's output
attention   q, k, v after the rotation, the output, and in fp32 one number per head
feed        gate, its activation, and up; with a mixture of experts once per expert that a token goes to
adapters    r numbers each; with dropout their own input and its mask

Tests compare this with what autograd really saves of tiny models. Other architectures differ by some ten per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionMemory = Literal["fused", "masked", "eager"]
"""masked: fused attention with a mask, which separates packed documents. eager: all scores exist."""


NormKind = Literal["rms", "rms fp32", "layer"]
"""rms fp32: which multiplies by its weight in fp32 (Gemma). layer: torch's LayerNorm."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which inputs of linear layers backward needs, because a weight or an adapter that reads them is trained."""

    attention: bool = True
    """The input of q, k and v."""
    feed: bool = True
    """The input of gate and up."""
    down: bool = True
    """The input of down."""
    experts: bool = True
    """The inputs of a mixture's experts."""
    norms: bool = True
    """Whether norms are trained."""
    adapters: int = 0
    """Sum of the ranks of a block's adapters."""
    dropped: int = 0
    """Sum of the inputs of a block's adapters, if they have dropout: each keeps its own."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Shape of a Hugging Face decoder, and what its backward needs."""

    layers: int
    """Number of blocks."""
    heads: int
    """Attention heads per block."""
    kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    dim: int
    """Width of the residual stream."""
    feed_forward: int
    """Width inside the feed-forward part, without a mixture of experts."""
    vocab_size: int
    """Rows of the embedding."""
    tied: bool = False
    """Whether the head shares the embedding's weights."""
    gated: bool = True
    """Whether the feed-forward part has a gate."""
    norms: int = 2
    """Norms per block of width `dim`."""
    head_norms: bool = False
    """Whether queries and keys are normalized."""
    norm: NormKind = "rms"
    activation_extra: int = 0
    """Tensors of the feed-forward part's width that its activation keeps beside its input: 3 for gelu_new, which is
    written out in Python."""
    experts: int = 0
    """Experts per block; 0: no mixture."""
    experts_per_token: int = 0
    expert_feed_forward: int = 0
    """Width inside an expert."""
    shared_feed_forward: int = 0
    """Width inside experts that every token goes to."""
    softcap: bool = False
    """Whether logits have a soft cap."""
    attention: AttentionMemory = "fused"
    kept: Kept = Kept()


def layer_bytes(shape: DecoderShape, seq_len: int, element_bytes: int) -> int:
    """Bytes per token that autograd keeps of one block."""
    e, kept = element_bytes, shape.kept
    queries = shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    found = shape.norms * _norm_bytes(shape, shape.dim, 1, e)
    found += e * shape.dim * (kept.attention + (kept.feed or (bool(shape.experts) and kept.experts)))
    if shape.head_norms:
        found += _norm_bytes(shape, queries, shape.heads, e) + _norm_bytes(shape, keys, shape.kv_heads, e)
    repeated = queries if shape.attention != "fused" else keys  # with a mask keys and values are repeated per head
    found += e * (2 * queries + 2 * repeated)
    found += {
        "fused": 4 * shape.heads,
        "masked": 4 * shape.heads + e * seq_len,
        "eager": (4 + e) * shape.heads * seq_len,
    }[shape.attention]
    found += _feed_bytes(shape, e)
    return found + e * kept.adapters + (e + 1) * kept.dropped


def _norm_bytes(shape: DecoderShape, width: int, count: int, e: int) -> int:
    if shape.norm == "layer":
        return e * width + 8 * count
    normalized = (4 if shape.norm == "rms fp32" else e) * width * shape.kept.norms
    return 4 * width + normalized + 4 * count


def _feed_bytes(shape: DecoderShape, e: int) -> int:
    """Inside of the feed-forward part, or of the experts that a token goes to."""
    tensors = 3 if shape.gated else 1 + shape.kept.down  # gate, activation, up: needed even with frozen weights
    tensors += shape.activation_extra
    if not shape.experts:
        return e * shape.feed_forward * (tensors + (shape.gated and shape.kept.down))
    routed = e * shape.expert_feed_forward * (tensors + (shape.gated and shape.kept.experts))
    routed += e * shape.dim * (1 + shape.kept.experts) + 24  # output, gathered input, three indices
    shared = e * shape.shared_feed_forward * (tensors + (shape.gated and shape.kept.down))
    return shape.experts_per_token * routed + shared + 4 * shape.experts


def end_bytes(shape: DecoderShape, element_bytes: int) -> int:
    """Bytes per token that autograd keeps outside of the blocks, without the logits: the last norm, its output or (with
    cross-entropy in chunks) the gradient of it, token, position and target."""
    return _norm_bytes(shape, shape.dim, 1, element_bytes) + element_bytes * shape.dim + 3 * 8
