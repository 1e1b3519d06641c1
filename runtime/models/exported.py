"""Loads a built-in GPT from a folder that `zerotop export` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from runtime.config.presets import GPTConfig, ModelError
from runtime.models.gpt import GPT
from runtime.models.weights import INDEX


def load_exported(folder: str | Path, device: torch.device | str = "cpu") -> GPT:
    """The exported model in its exported precision, in eval mode. Raises ModelError if `folder` holds none."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        shape = GPTConfig(**config["zerotop_gpt"])
        files = ["model.safetensors"]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is not an exported GPT of zerotop: {type(error).__name__}: {error}") from None
    model = GPT(shape, device="meta")  # no memory, no random numbers: all values are in the files
    lacking = {name for name, _ in model.named_parameters()}
    for file in files:
        values: dict[str, Any] = load_file(folder / file, device=str(device))
        try:
            unexpected = model.load_state_dict(values, strict=False, assign=True).unexpected_keys
        except RuntimeError as error:
            raise ModelError(f"{folder / file} does not fit its config.json: {error}") from None
        if unexpected:
            raise ModelError(f"{folder / file} holds {unexpected[0]}, which the model of its config.json lacks")
        lacking -= values.keys()
    if lacking:
        raise ModelError(f"{folder} lacks {min(lacking)}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)))
    if shape.tied:
        model.head.weight = model.embedding.weight  # stored once, and `assign` has untied them
    return model.requires_grad_(False).eval()
