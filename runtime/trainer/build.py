"""Builds the model that a config describes, without its weights, and checks that the weights are there."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from runtime.config import ConfigError, Resolved
from runtime.models import huggingface
from runtime.models.weights import Weights


def build_model(config: Resolved, model_config: Any, tokens: int) -> Any:
    """The model with new tokens, adapters, checkpointing and compilation as `config` asks. Call it under zero.Init.

    model_config: transformers'. tokens: size of the tokenizer's vocabulary, with zerotop.model.new_tokens. Raises
    ConfigError, naming the key, for what the model does not have.
    """
    section = config.zerotop.model
    model = huggingface.build(model_config, section)
    if section.new_tokens:
        embedding = huggingface.embedding_name(model)
        if config.zerotop.lora is not None and embedding not in config.zerotop.lora.modules_to_save:
            raise ConfigError(
                "zerotop.model.new_tokens: with zerotop.lora the embedding is frozen, so they would mean nothing; "
                f'train it: "modules_to_save": ["{embedding}"] in zerotop.lora'
            )
        huggingface.grow_vocabulary(model, tokens)
    if config.activation_checkpointing is not None:
        huggingface.checkpoint_blocks(model)
    if config.zerotop.lora is not None:
        from runtime.models.lora import add_adapters

        model = add_adapters(model, config.zerotop.lora)
    if section.compile:
        huggingface.compile_blocks(model)
    return model


def check_model(config: Resolved, model_config: Any, tokens: int, folder: Path) -> int:
    """Build the model on the meta device, and look for its weights in `folder`. Returns its number of parameters.

    Raises ConfigError for what the ranks would refuse later: adapters that match nothing, a missing file, no compiler.
    """
    if config.zerotop.model.compile and config.device == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"zerotop.model.compile: torch.compile needs the C++ compiler {compiler} to train on the CPU, and it "
                "is not installed here; install it, name another one in CXX, or leave compile out"
            )
    config = config.model_copy(
        update={
            "zerotop": config.zerotop.model_copy(
                update={"model": config.zerotop.model.model_copy(update={"compile": False})}
            )
        }
    )
    with torch.device("meta"):
        model = build_model(config, model_config, tokens)
    Weights.open(folder)
    return sum(parameter.numel() for parameter in model.parameters())
