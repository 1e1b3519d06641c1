"""Model FLOPs per token in closed form, for the model FLOPs utilization (MFU). Torch-free.

Source: PaLM, appendix B (arXiv 2204.02311). Training takes 6 N + 12 L H Q T floating-point operations per token: a
multiply-add is two, forward multiplies each of the N weights once, backward twice (gradients of input and of weight);
attention multiplies queries by keys and scores by values of T tokens in each of L layers with H heads of width Q. Here:

N           weights of matrix multiplications: without embeddings that are only looked up, norms and biases. Of a
            mixture of experts, those that a token goes to.
4 N         for frozen weights, which have no gradient of their own (LoRA).
T           the sequence length. As in PaLM, masks do not reduce it: neither the causal one, nor those of packed
            documents and sliding windows.

MFU does not count what activation checkpointing computes again; hardware FLOPs utilization (HFU) does: one more forward
of the blocks. (torch stops before the last product of each checkpointed group, so a little less is computed.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.config.presets import GPTConfig
from runtime.plan.decoder import DecoderShape
from runtime.plan.named_units import Param, runs_before

TRAINED, FROZEN, FORWARD = 6, 4, 2
"""FLOPs per token and weight: forward and backward of a trained one, of a frozen one, and forward alone."""


@dataclass(frozen=True, slots=True)
class ActiveWeights:
    """Numbers of weights that a token is multiplied with."""

    trained: int
    frozen: int = 0
    in_blocks: int = 0
    """Those of both kinds that are in blocks, which activation checkpointing computes again."""


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs of forward and backward per token."""

    model: float
    """Without recomputation: what MFU counts."""
    hardware: float
    """With the recomputation of activation checkpointing: what HFU counts."""


def gpt_weights(shape: GPTConfig) -> ActiveWeights:
    """The weights of the built-in GPT: 12 dim^2 per block (runtime/config/presets.py), and the head."""
    blocks = shape.layers * 12 * shape.dim**2
    return ActiveWeights(blocks + shape.vocab_size * shape.dim, in_blocks=blocks)


def named_weights(parameters: Sequence[Param], shape: DecoderShape, head: str) -> ActiveWeights:
    """The weights of a Hugging Face decoder with its adapters, from its parameters' names and shapes. head: the path of
    the head."""
    names = {one.name for one in parameters}
    trained = frozen = in_blocks = 0
    for one in parameters:
        module, _, kind = one.name.rpartition(".")
        replaced = not one.trained and f"{module}.modules_to_save.default.{kind}" in names
        if replaced or not _multiplies(one, head):
            continue
        count = one.numel
        if "experts" in one.name.split("."):
            count = count * shape.experts_per_token // max(1, shape.experts)
        if one.trained:
            trained += count
        else:
            frozen += count
        if any(part.isdigit() for part in one.name.split(".")):
            in_blocks += count
    return ActiveWeights(trained, frozen, in_blocks)


def _multiplies(one: Param, head: str) -> bool:
    """Whether the parameter is the matrix of a multiplication."""
    if len(one.shape) < 2 or one.name.endswith("bias"):
        return False
    is_head = any(f".{head}." in f".{name}" for name in (one.name, one.also) if name)
    return is_head or not runs_before(one.name)


def flops_per_token(
    shape: GPTConfig | DecoderShape, weights: ActiveWeights, seq_len: int, recomputed: bool = False
) -> FlopsPerToken:
    """FLOPs of forward and backward per token, in sequences of `seq_len` tokens. recomputed: whether activation
    checkpointing computes the blocks' forward again."""
    width = shape.dim if isinstance(shape, GPTConfig) else shape.heads * shape.head_dim
    attention = 4 * shape.layers * width * seq_len
    model = TRAINED * weights.trained + FROZEN * weights.frozen + 3 * attention
    again = FORWARD * weights.in_blocks + attention if recomputed else 0
    return FlopsPerToken(float(model), float(model + again))
