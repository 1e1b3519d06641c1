"""Estimates of a step's memory beyond the states, from a model's shape; and shapes guessed from a parameter count.

Torch-free. The figures are for the built-in GPT (no dropout, fused attention) and for Hugging Face decoders
(decoder.py); other transformers of the same shape differ by some ten per cent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from runtime.config.presets import GPTConfig, unit_parameters
from runtime.plan.decoder import DecoderShape, Kept, end_bytes, layer_bytes
from runtime.plan.loss_chunks import chunked_logits_bytes, whole_logits_bytes

CUDA_CONTEXT_BYTES = 500 * 10**6
"""A process's CUDA context with its kernels: 0.3-0.6 GB are seen."""

NCCL_BYTES = 600 * 10**6
"""One NCCL communicator's channels: 544-688 MB were seen on A100."""

EXPORT_PROCESS_BYTES = 250 * 10**6
"""Python and torch in a process that only reads tensors: 0.2-0.3 GB are seen."""

EXPORT_FILE_BYTES = 5 << 30
"""Size of a file of `zerotop export`, unless --shard-size says otherwise."""

LAYERS_ON_DEVICE = 3
"""Layers whose activations are on the device at a time if these are offloaded: one that computes, one whose copies are
under way, and the last one, which is not offloaded (runtime/models/activations.py)."""

# Layers and width of published models, for guessing the shape behind a parameter count.
_SHAPES = (
    (4, 256),
    (8, 512),
    (12, 768),
    (24, 1024),
    (24, 2048),
    (32, 2560),
    (32, 4096),
    (40, 5120),
    (60, 6656),
    (80, 8192),
)
_SHAPES_LARGE = ((96, 12288), (118, 16384))


def activation_bytes(
    config: GPTConfig | DecoderShape,
    micro_batch: int,
    seq_len: int,
    element_bytes: int,
    segments: int | None = None,
    inputs_on_host: bool = False,
) -> int:
    """Bytes that autograd keeps from forward to backward, without the logits, plus one layer's for backward itself.

    segments: number of groups of layers with activation checkpointing, of which only the inputs are kept; backward
    recomputes one group at a time. None: everything is kept. inputs_on_host: whether what layers keep is offloaded:
    these inputs, or everything, of which two layers' and the last one's is then on the device.
    """
    tokens = micro_batch * seq_len
    layer, ends = _layer_bytes(config, seq_len, element_bytes), _end_bytes(config, element_bytes)
    if segments is None:
        layers = min(LAYERS_ON_DEVICE, config.layers) if inputs_on_host else config.layers
        return tokens * ((layers + 1) * layer + ends)
    size = -(-config.layers // min(segments, config.layers))
    inputs = tokens * config.dim * element_bytes
    if not inputs_on_host:
        inputs = kept_input_bytes(config, micro_batch, seq_len, element_bytes, segments)
    return tokens * ((size + 1) * layer + ends) + inputs


def _layer_bytes(config: GPTConfig | DecoderShape, seq_len: int, element_bytes: int) -> int:
    """Bytes per token that autograd keeps of one layer.

    Of the GPT 16 * dim elements: 2 norm inputs, 2 norm outputs, q, k, v, attention's output, and 8 around the
    activation function (attention's output twice on a CPU, whose kernel leaves it in another order); and in fp32 two
    numbers per norm and one per head. A test compares this with what autograd really saves.
    """
    if isinstance(config, GPTConfig):
        return 16 * config.dim * element_bytes + 4 * (2 * 2 + config.heads)
    return layer_bytes(config, seq_len, element_bytes)


def _end_bytes(config: GPTConfig | DecoderShape, element_bytes: int) -> int:
    """Bytes per token that autograd keeps outside of the layers, without the logits."""
    if isinstance(config, GPTConfig):
        return 2 * config.dim * element_bytes + 4 * 2 + 2 * 8
    return end_bytes(config, element_bytes)


def kept_input_bytes(
    config: GPTConfig | DecoderShape, micro_batch: int, seq_len: int, element_bytes: int, segments: int
) -> int:
    """Bytes of the inputs of all groups of layers, with activation checkpointing."""
    size = -(-config.layers // min(segments, config.layers))
    return micro_batch * seq_len * -(-config.layers // size) * config.dim * element_bytes


def offloaded_bytes(config: GPTConfig | DecoderShape, micro_batch: int, seq_len: int, element_bytes: int) -> int:
    """Bytes of offloaded activations without activation checkpointing: those of all layers but the last one."""
    return micro_batch * seq_len * (config.layers - 1) * _layer_bytes(config, seq_len, element_bytes)


def logits_bytes(
    config: GPTConfig | DecoderShape,
    micro_batch: int,
    seq_len: int,
    element_bytes: int,
    chunked: bool = False,
    head_trained: bool = True,
) -> int:
    """Bytes of logits and what cross-entropy makes of them. chunked: whether it is computed in chunks."""
    tokens, vocab = micro_batch * seq_len, config.vocab_size
    if not chunked:
        return whole_logits_bytes(tokens, vocab, element_bytes)
    softcap = isinstance(config, DecoderShape) and config.softcap
    return chunked_logits_bytes(tokens, vocab, config.dim, element_bytes, weight_grad=head_trained, softcap=softcap)


def evaluation_bytes(
    config: GPTConfig | DecoderShape,
    micro_batch: int,
    seq_len: int,
    element_bytes: int,
    chunked: bool = False,
    new_tokens: int = 0,
) -> int:
    """Most bytes that an evaluation holds beyond the states. Nothing is kept for a backward, so for tokens t, width d
    and e bytes per element it is the larger of

        t * (layer + 3 d e) + logits    the loss: what one layer computes (as much as its backward would need, were all
                                        of it trained), its input and output, the last norm; then the logits, of one
                                        chunk or whole, with what cross-entropy makes of them
        2 * layers * kv * e * n         a text that the model writes: keys and values of width kv for n new tokens;
                                        those of the prompt, whose length is not known, come on top

    where logits and layer are not held at once, but the allocator keeps the memory of both.
    """
    tokens = micro_batch * seq_len
    whole = dataclasses.replace(config, kept=Kept()) if isinstance(config, DecoderShape) else config
    logits = logits_bytes(config, micro_batch, seq_len, element_bytes, chunked, head_trained=False)
    loss = tokens * (_layer_bytes(whole, seq_len, element_bytes) + 3 * config.dim * element_bytes) + logits
    keys = config.kv_heads * config.head_dim if isinstance(config, DecoderShape) else config.dim
    return max(loss, 2 * config.layers * keys * element_bytes * new_tokens)


def export_bytes(parameter_bytes: int, largest_unit: int, world_size: int) -> int:
    """Host memory of `zerotop export` in bytes: EXPORT_PROCESS_BYTES + one file + one slice.

    A file holds EXPORT_FILE_BYTES of tensors, if there are so many (one tensor that is larger has a file of its own;
    that is not counted), in the precision that the run computes in. A slice is what one rank stored of one tensor, in
    fp32: at most 4 bytes per element of the largest unit, over the ranks.
    """
    return EXPORT_PROCESS_BYTES + min(parameter_bytes, EXPORT_FILE_BYTES) + 4 * -(-largest_unit // world_size)


def fresh_gradient_bytes(
    config: GPTConfig | DecoderShape, element_bytes: int, beside: int, largest: int = 0, tied_table: int = 0
) -> int:
    """Bytes of gradients in autograd's own memory, before the engine copies them: what they add to the `beside` bytes
    of activations and logits that are held when backward starts.

    Only one gradient exists at a time, except that of a tied embedding: the head's part stays until the embedding's is
    made, and autograd adds both into a third tensor, when all activations are freed.

    largest, tied_table: elements of the largest trained parameter, and of a trained embedding that the head shares, of
    a Hugging Face model.
    """
    if isinstance(config, GPTConfig):
        largest = max(config.vocab_size * config.dim, 4 * config.dim**2)
        tied_table = config.vocab_size * config.dim if config.tied else 0
    if not tied_table:
        return largest * element_bytes
    table = tied_table * element_bytes
    return max(beside + table, 3 * table) - beside


def context_bytes(world_size: int) -> int:
    """Bytes of the CUDA context and, with several ranks, of NCCL's channels."""
    return CUDA_CONTEXT_BYTES + (NCCL_BYTES if world_size > 1 else 0)


def guess_shape(parameters: int, vocab_size: int, seq_len: int) -> GPTConfig:
    """A GPT of about this many parameters, with the width of the nearest published model."""
    _, dim = min(_SHAPES + _SHAPES_LARGE, key=lambda shape: abs(math.log(12 * shape[0] * shape[1] ** 2 / parameters)))
    left = max(1, parameters - 2 * vocab_size * dim)
    layers = max(1, round(left / (12 * dim**2)))
    return GPTConfig(layers, max(1, dim // 128), dim, vocab_size, seq_len)


def guess_units(parameters: int, config: GPTConfig) -> list[tuple[str, int]]:
    """(name, parameters) of units in the proportions of `config`'s, with exactly `parameters` parameters in all."""
    units = unit_parameters(config)
    total = sum(numel for _, numel in units)
    edges = [parameters * seen // total for seen in itertools.accumulate((numel for _, numel in units), initial=0)]
    sizes = [end - start for start, end in itertools.pairwise(edges)]
    return [(name, size) for (name, _), size in zip(units, sizes, strict=True)]


def guess_adapters(config: GPTConfig, r: int, small_below: int) -> dict[str, int]:
    """Unit -> parameters of LoRA adapters of rank `r` on every linear layer of the blocks of `config`. Those with fewer
    than `small_below` elements are in the unit "small"."""
    found: dict[str, int] = {}
    linear = ((1, 3), (1, 1), (1, 4), (4, 1))  # (inputs, outputs) of qkv, attention's output and the feed-forward part
    for index in range(config.layers):
        unit = f"blocks.{index}" if config.layers > 1 else "root"
        for numel in (r * config.dim * side for sides in linear for side in sides):
            name = "small" if numel < small_below else unit
            found[name] = found.get(name, 0) + numel
    return found
