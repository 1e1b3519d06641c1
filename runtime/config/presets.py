"""Shapes of the built-in GPT and their exact parameter counts. Torch-free, so that `zerotop plan` can use it.

The model (runtime/models/gpt.py) has no biases and rotary positions, so a block of width d has
4d^2 (attention) + 8d^2 (feed-forward) + 2d (two norms) = 12d^2 + 2d parameters, whatever the sequence length.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

VOCAB_MULTIPLE = 64
"""The embedding's rows are padded to a multiple of this."""


class ModelError(ValueError):
    """An invalid model section; the message names the key and how to fix it."""


@dataclasses.dataclass(frozen=True, slots=True)
class GPTConfig:
    """Shape of the built-in GPT."""

    layers: int
    """Number of blocks."""
    heads: int
    """Attention heads per block."""
    dim: int
    """Width of the residual stream."""
    vocab_size: int
    """Rows of the embedding, padded beyond the tokenizer's tokens."""
    max_seq_len: int
    """Longest sequence in tokens."""
    tied: bool = False
    """Whether the head shares the embedding's weights."""

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


def unit_parameters(
    config: GPTConfig, small_below: int = 0, patterns: Sequence[str] | None = None
) -> list[tuple[str, int]]:
    """(unit, number of parameters) in forward order, divided as in runtime/zero/cut.py: the embedding, each block, norm
    and head, or the modules that `patterns` (the config's zerotop.units) match.

    A parameter that several units use (a tied embedding), or none, belongs to the root unit, which comes first. Those
    with fewer than `small_below` elements form the unit "small". Units without parameters are left out.

    Raises ModelError where no module has a name that a pattern matches.
    """
    names = _units(config, patterns)
    sizes = dict.fromkeys(("root", "small", *names), 0)
    for unit, numel in _units_of_parameters(config, small_below, names):
        sizes[unit] += numel
    return [(unit, numel) for unit, numel in sizes.items() if numel]


def gradient_arrivals(
    config: GPTConfig, small_below: int = 0, patterns: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The unit of each parameter (see `unit_parameters`) in the order in which backward produces the gradients."""
    forward = _units_of_parameters(config, small_below, _units(config, patterns))
    return tuple(reversed([unit for unit, _ in forward]))


def _units(config: GPTConfig, patterns: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    return _chosen(config, patterns) if patterns else _default_units(config)


def _units_of_parameters(
    config: GPTConfig, small_below: int, units: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, int]]:
    """(unit, number of elements) of each parameter in forward order; a tied embedding counts where it is used first."""
    unit_of = {module: unit for unit, modules in units.items() for module in modules}
    for modules, numel in _modules_of_parameters(config):
        owners = {unit_of[outer] for module in modules for outer in _paths(module) if outer in unit_of}
        owner = owners.pop() if len(owners) == 1 else "root"
        yield "small" if numel < small_below else owner, numel


def _modules_of_parameters(config: GPTConfig) -> Iterator[tuple[tuple[str, ...], int]]:
    """(modules that share it, number of elements) of each parameter."""
    dim, table = config.dim, config.vocab_size * config.dim
    yield ("embedding", "head") if config.tied else ("embedding",), table
    in_a_block = {"attention_norm": dim, "qkv": 3 * dim**2, "attention_out": dim**2}
    in_a_block |= {"feed_norm": dim, "feed_in": 4 * dim**2, "feed_out": 4 * dim**2}
    for index in range(config.layers):
        yield from (((f"blocks.{index}.{name}",), numel) for name, numel in in_a_block.items())
    yield ("norm",), dim
    if not config.tied:
        yield ("head",), table


def _default_units(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """The modules of each unit. With a single block there is no list of blocks, and the model is one unit."""
    if config.layers == 1:
        return {}
    blocks = {f"blocks.{index}": (f"blocks.{index}",) for index in range(config.layers)}
    return {"embedding": ("embedding",), **blocks, "head": ("norm", "head")}


def _chosen(config: GPTConfig, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules that `patterns` match, except those inside another match."""
    untied = dataclasses.replace(config, tied=False)  # whose parameters are in the order of the model's modules
    names = dict.fromkeys(path for (module,), _ in _modules_of_parameters(untied) for path in _paths(module))
    missing = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if missing:
        raise ModelError(
            f"zerotop.units: no module is called {', '.join(map(repr, missing))}; the built-in GPT has "
            f"{', '.join(repr(name) for name in list(names)[:8])}..."
        )
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: (name,) for name in chosen if not any(outer in chosen for outer in _paths(name)[:-1])}


def _paths(module: str) -> list[str]:
    """Paths of the enclosing modules, outermost first, and of the module itself."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def parameters(config: GPTConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(numel for _, numel in unit_parameters(config))
