"""Shapes of the built-in GPT and their exact parameter counts. Torch-free, so that `zerotop plan` can use it.

The model (runtime/models/gpt.py) has no biases and rotary positions, so a block of width d has
4d^2 (attention) + 8d^2 (feed-forward) + 2d (two norms) = 12d^2 + 2d parameters, whatever the sequence length.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

VOCAB_MULTIPLE = 64


class ModelError(ValueError):
    """The model section cannot be built; the message names the key and the way out."""


@dataclasses.dataclass(frozen=True, slots=True)
class GPTConfig:
    """Shape of the built-in GPT. `vocab_size` counts rows of the embedding (padded), not the tokenizer's tokens."""

    layers: int
    heads: int
    dim: int
    vocab_size: int
    max_seq_len: int
    tied: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "heads", "dim", "vocab_size", "max_seq_len"):
            if getattr(self, field) < 1:
                raise ModelError(f"zerotop.model.{field} must be at least 1, got {getattr(self, field)}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ModelError(
                f"zerotop.model.dim ({self.dim}) must be a multiple of twice zerotop.model.heads ({self.heads}): "
                "rotary positions turn pairs of numbers within each head"
            )


PRESETS: dict[str, GPTConfig] = {
    # The large ones tie the embedding to the head as GPT-2 and GPT-3 do, so their names are right with GPT-2's
    # vocabulary (50,257 padded to 50,304). The small ones are untied: their vocabulary is bytes, next to nothing, and
    # an untied head learns faster. The 7B one is untied as Llama's is.
    "gpt-tiny": GPTConfig(layers=4, heads=4, dim=256, vocab_size=320, max_seq_len=1024),
    "gpt-small": GPTConfig(layers=8, heads=8, dim=512, vocab_size=320, max_seq_len=1024),
    "gpt-124m": GPTConfig(layers=12, heads=12, dim=768, vocab_size=50304, max_seq_len=1024, tied=True),
    "gpt-350m": GPTConfig(layers=24, heads=16, dim=1024, vocab_size=50304, max_seq_len=1024, tied=True),
    "gpt-1.3b": GPTConfig(layers=24, heads=16, dim=2048, vocab_size=50304, max_seq_len=2048, tied=True),
    "gpt-7b": GPTConfig(layers=32, heads=32, dim=4096, vocab_size=50304, max_seq_len=2048),
}


def padded_vocab(tokens: int) -> int:
    """Rows of the embedding for a tokenizer of `tokens` tokens: the next multiple of 64 (matrix units like it)."""
    return -(-tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def preset(name: str) -> GPTConfig:
    """The preset of that name. Raises ModelError with the nearest name for an unknown one."""
    found = PRESETS.get(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(f"zerotop.model.preset: no preset {name!r}{hint} (presets: {', '.join(PRESETS)})")


def load_model_config(section: Any, vocab_size: int | None = None, seq_len: int | None = None) -> GPTConfig:
    """Shape for a `zerotop.model` section (an object or mapping with `preset`), a preset's name or a GPTConfig.

    `vocab_size` is the tokenizer's number of tokens (it is padded here), `seq_len` the training sequence length;
    without them the preset's own hold. Raises ModelError for an unknown preset or a model that is not the built-in GPT.
    """
    config = section if isinstance(section, GPTConfig) else preset(_preset_name(section))
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=padded_vocab(vocab_size))
    if seq_len is not None:
        config = dataclasses.replace(config, max_seq_len=seq_len)
    return config


def _preset_name(section: Any) -> str:
    if isinstance(section, str):
        return section
    name, path = (
        section.get(key) if isinstance(section, dict) else getattr(section, key, None) for key in ("preset", "path")
    )
    if name is None:
        found = f"path {path!r}" if path is not None else "neither preset nor path"
        raise ModelError(
            f"zerotop.model: expected a preset of the built-in GPT ({', '.join(PRESETS)}), got {found}; "
            "a model of your own, from Hugging Face too, trains from a script (zerotop launch CONFIG -- SCRIPT.py)"
        )
    return str(name)


def unit_parameters(config: GPTConfig, small_below: int = 0) -> list[tuple[str, int]]:
    """(unit, number of parameters) in forward order, cut as the engine cuts: the embedding, each block, norm and head.

    A tied embedding is used by two units and therefore belongs to the root unit. Parameters of fewer than `small_below`
    elements are set apart in the unit "small". Units without parameters are left out.
    """
    dim, table = config.dim, config.vocab_size * config.dim
    square = dim**2
    sizes = {"root" if config.tied else "embedding": [table]}
    sizes |= {
        f"blocks.{index}": [3 * square, square, 4 * square, 4 * square, dim, dim] for index in range(config.layers)
    }
    sizes["head"] = [dim] if config.tied else [dim, table]
    units = [(name, sum(size for size in found if size >= small_below)) for name, found in sizes.items()]
    small = sum(size for found in sizes.values() for size in found if size < small_below)
    at = 1 if config.tied else 0  # behind the root unit, before the others
    return [(name, numel) for name, numel in (*units[:at], ("small", small), *units[at:]) if numel]


def parameters(config: GPTConfig) -> int:
    """Number of parameters, a tied table counted once."""
    return sum(numel for _, numel in unit_parameters(config))
