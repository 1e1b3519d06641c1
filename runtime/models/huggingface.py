"""Builds a Hugging Face causal language model without its weights, for zero.Init to fill from the model's files.

transformers is imported inside functions: the built-in GPT trains without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.config import ConfigError, ModelConfig
from runtime.config.presets import VOCAB_MULTIPLE
from runtime.models.hub import KEY
from runtime.models.weights import ROWS_MARK
from runtime.process.extras import INSTALL_FINETUNING

log = logging.getLogger("runtime.models")

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Keys of config.json that say how many positions a model has."""


def check_installed() -> None:
    """Raise ConfigError unless transformers can be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{KEY}: a Hugging Face model needs packages that are not installed ({error}): {INSTALL_FINETUNING}"
        ) from None


def load_config(folder: Path, section: ModelConfig) -> Any:
    """The transformers config of the model in `folder`. Raises ConfigError for one that cannot be trained here: no
    causal language model, quantized, or unknown to this version of transformers."""
    check_installed()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{KEY}: {section.path} brings Python code of its own. Read it, and then set "
                '"trust_remote_code": true in zerotop.model'
            ) from None
        raise ConfigError(f"{KEY}: {section.path}: config.json cannot be used: {text}") from None
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"{KEY}: {section.path} holds quantized weights, which cannot be trained or sharded; give the original "
            "16-bit model"
        )
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if not causal and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        architectures = ", ".join(config.architectures or [type(config).__name__])
        raise ConfigError(f"{KEY}: {section.path} is a {architectures}: expected a causal language model")
    return config


def load_tokenizer(folder: Path, named: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`, which the config calls `named`. Raises ConfigError if there is none."""
    check_installed()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the libraries raise plain Exception for some files that they cannot read
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"zerotop.data.tokenizer: {named} has no tokenizer that transformers can read: {text}"
        ) from None


def positions(config: Any) -> int | None:
    """Number of positions that the model was made for; None if its config does not say."""
    text = config.get_text_config()
    return next((int(found) for name in _POSITIONS if (found := getattr(text, name, None))), None)


def vocabulary(config: Any) -> int:
    """Rows of the model's embedding."""
    return int(config.get_text_config().vocab_size)


def check_positions(config: Any, seq_len: int) -> None:
    """Raise ConfigError if sequences are longer than what the model was made for."""
    limit = positions(config)
    if limit is not None and seq_len > limit:
        raise ConfigError(
            f"zerotop.data.seq_len: expected at most {limit:,}, the number of positions of the model, got {seq_len:,}"
        )


def build(config: Any, section: ModelConfig) -> Any:
    """The model in fp32, newly made, without dropout turned on or off by anybody. Under zero.Init it takes no memory.

    Raises ConfigError if this attention cannot be used with it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=section.attention,
            dtype=torch.float32,
            trust_remote_code=section.trust_remote_code,
        )
    except (ImportError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        if section.attention in str(error) or "ttention" in text:
            raise ConfigError(f'zerotop.model.attention: "{section.attention}" cannot be used: {text}') from None
        raise
    return model


def grow_vocabulary(model: Any, rows: int) -> None:
    """Give embedding and head at least `rows` rows, a multiple of 64. Call it under zero.Init(weights=...): the values
    of the new rows are the mean of those in the files."""
    before = model.get_input_embeddings().num_embeddings
    if rows <= before:
        return
    model.resize_token_embeddings(rows, pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.__dict__[ROWS_MARK] = before
    log.info(
        f"zerotop.model.new_tokens: the embedding grows from {before:,} to "
        f"{model.get_input_embeddings().num_embeddings:,} rows"
    )


def embedding_name(model: Any) -> str:
    """The last part of the name of the model's embedding, such as "embed_tokens"."""
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding).rpartition(".")[2]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of the model's blocks: the largest ModuleList that is not inside another."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer, _ in found):
            found.append((name, module))
    if not found:
        raise ConfigError(f"{KEY}: {type(model).__name__} has no list of blocks")
    return max((module for _, module in found), key=lambda module: sum(p.numel() for p in module.parameters()))


def checkpoint_blocks(model: Any) -> None:
    """Recompute the activations of each block in backward."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"activation_checkpointing: {type(model).__name__} does not support it")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the newer name
    enable({"use_reentrant": False})


def checkpoint_with(model: nn.Module, function: Callable[..., Any]) -> None:
    """Let blocks that recompute their activations do so by `function`, in the place of torch's checkpoint."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = function  # type: ignore[assignment]


def compile_blocks(model: nn.Module) -> None:
    """Let torch.compile compile each block at its first forward; the engine's hooks stay outside of it."""
    stack = blocks(model)
    for index, block in enumerate(stack):
        stack[index] = torch.compile(block)  # type: ignore[assignment]


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> int:
    """Add tokens to the tokenizer, as special ones; returns how many were new."""
    return int(tokenizer.add_tokens(list(tokens), special_tokens=True))
