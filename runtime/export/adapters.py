"""The LoRA adapters of a checkpoint, under the names that peft expects in its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.checkpoint.content.describe import ADAPTER_CONFIG, ADAPTER_KEY
from runtime.checkpoint.format.manifest import CheckpointError
from runtime.checkpoint.format.reader import CheckpointTensor
from runtime.models.names import has_adapters

ADAPTER_FILE = "adapter_model.safetensors"
BASE = "base_model.model."
"""Prefix that peft's wrapper adds to the base model's names."""
ALTERNATIVE = (
    "load the checkpoint in the training script instead, and inside zero.GatheredParameters(model.parameters()) call "
    "peft's save_pretrained(), or merge_and_unload() and then save_pretrained()"
)


@dataclass(frozen=True)
class Adapters:
    """The contents of an export of LoRA adapters, which PeftModel.from_pretrained(base, OUT) loads."""

    config: bytes
    """Contents of adapter_config.json."""
    names: list[tuple[str, str]]
    """(name in the checkpoint, name in peft's file) of the tensors to export. peft writes tied ones twice."""


def find_adapters(
    path: Any,
    config: bytes | None,
    tensors: Iterable[CheckpointTensor],
    frozen: Iterable[str],
    tied: Mapping[str, str] = MappingProxyType({}),
    base_name: str | None = None,
) -> Adapters:
    """The adapters among `tensors`. tied: other names of tied parameters -> those in the checkpoint. base_name: how
    their config names the base model, instead of where it was on the machine that trained. Raises CheckpointError, with
    an alternative, for adapters that can't be exported."""
    example = next(stored.name for stored in tensors if has_adapters([stored.name]))
    refusal = f"checkpoint {path} is of a model with peft's adapters ({example})"
    if config is None:
        raise CheckpointError(f"{refusal} but has no {ADAPTER_CONFIG}, which peft needs: {ALTERNATIVE}")
    try:
        written = json.loads(config)
        adapter, kind = written.pop(ADAPTER_KEY), written["peft_type"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{refusal}, and its {ADAPTER_CONFIG} is damaged ({error}): {ALTERNATIVE}") from None
    if kind != "LORA":
        raise CheckpointError(f"{refusal} of type {kind}; only LORA can be exported: {ALTERNATIVE}")
    if base_name is not None:
        written["base_model_name_or_path"] = base_name
    fixed, names = set(frozen), dict[str, str]()
    for stored in tensors:
        parts = stored.name.split(".")
        if adapter in parts:
            names[stored.name] = _as_peft(parts, adapter)
        elif stored.is_parameter and stored.name not in fixed:
            if written.get("bias", "none") == "none" or parts[-1] != "bias":
                raise CheckpointError(
                    f"{refusal}, and {stored.name}, which is not part of them, was trained, too: {ALTERNATIVE}"
                )
            names[stored.name] = _as_peft(parts, adapter)
    again = [(known, _as_peft(other.split("."), adapter)) for other, known in tied.items() if known in names]
    return Adapters((json.dumps(written, indent=2, sort_keys=True) + "\n").encode(), [*names.items(), *again])


def _as_peft(parts: list[str], adapter: str) -> str:
    """The name in peft's files: it starts at peft's wrapper and leaves out the adapter's name."""
    kept = [part for part in parts if part not in (adapter, "modules_to_save")]
    # DoRA's vectors are modules in memory, and tensors in the file.
    if len(kept) > 1 and kept[-2] == "lora_magnitude_vector":
        kept.pop()
    name = ".".join(kept)
    at = name.find(BASE)
    return name[at:] if at >= 0 else BASE + name
