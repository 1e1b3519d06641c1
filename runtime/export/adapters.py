"""Adapters of a checkpoint, under the names by which peft reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from runtime.checkpoint.describe import ADAPTER_CONFIG, ADAPTER_KEY
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.reader import CheckpointTensor

ADAPTER_FILE = "adapter_model.safetensors"
_BASE = "base_model.model."
_INSIDE = ("base_layer", "modules_to_save")
"""Parts of names that peft's layers bring into a model, beside those that begin with lora_."""
_WAY_OUT = (
    "load the checkpoint in the training script instead, and inside zero.GatheredParameters(model.parameters()) call "
    "peft's save_pretrained(), or merge_and_unload() and then save_pretrained()"
)


def has_adapters(names: Iterable[str]) -> bool:
    """Whether a model with such names is one that peft has changed."""
    return any(part in _INSIDE or part.startswith("lora_") for name in names for part in name.split("."))


@dataclass(frozen=True)
class Adapters:
    """An export of a model with LoRA adapters: they alone, as PeftModel.from_pretrained(base, OUT) has it."""

    config: bytes
    """adapter_config.json."""
    names: dict[str, str]
    """Of the tensors that belong to them, by their names in the checkpoint."""


def find_adapters(
    path: Any, config: bytes | None, tensors: Iterable[CheckpointTensor], frozen: Iterable[str]
) -> Adapters:
    """Raises CheckpointError, with the way out, for adapters that can't be written so that peft reads them."""
    example = next(stored.name for stored in tensors if has_adapters([stored.name]))
    refusal = f"checkpoint {path} is of a model with peft's adapters ({example})"
    if config is None:
        raise CheckpointError(f"{refusal} and has no {ADAPTER_CONFIG}, without which nobody can read them: {_WAY_OUT}")
    try:
        written = json.loads(config)
        adapter, kind = written.pop(ADAPTER_KEY), written["peft_type"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{refusal}, and its {ADAPTER_CONFIG} is damaged ({error}): {_WAY_OUT}") from None
    if kind != "LORA":
        raise CheckpointError(f"{refusal} of type {kind}; expected LORA, whose names are known here: {_WAY_OUT}")
    fixed, names = set(frozen), {}
    for stored in tensors:
        parts = stored.name.split(".")
        if adapter in parts:
            names[stored.name] = _as_peft(parts, adapter)
        elif stored.is_parameter and stored.name not in fixed:
            if written.get("bias", "none") == "none" or parts[-1] != "bias":
                raise CheckpointError(
                    f"{refusal}, and {stored.name}, which is none of them, was trained, too: {_WAY_OUT}"
                )
            names[stored.name] = _as_peft(parts, adapter)
    return Adapters((json.dumps(written, indent=2, sort_keys=True) + "\n").encode(), names)


def _as_peft(parts: list[str], adapter: str) -> str:
    """The name in peft's files: from its wrapper on, without the adapters' own name."""
    kept = [part for part in parts if part not in (adapter, "modules_to_save")]
    # DoRA's vectors are modules in memory, and tensors in the file.
    if len(kept) > 1 and kept[-2] == "lora_magnitude_vector":
        kept.pop()
    name = ".".join(kept)
    at = name.find(_BASE)
    return name[at:] if at >= 0 else _BASE + name
