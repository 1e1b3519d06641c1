"""The files in a checkpoint's model/ folder: the model's config and tokenizer. Never imports transformers: a Hugging
Face model is recognised by its config's to_dict() or to_json_string()."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from runtime.checkpoint.format.manifest import Manifest
from runtime.config import Resolved
from runtime.models.gpt import GPT
from runtime.models.names import plain_name
from runtime.models.origin import Origin, origin_of
from runtime.wire.rundir import RunFile

log = logging.getLogger("runtime.checkpoint")

GPT_TYPE = "zerotop-gpt"
"""`model_type` of the built-in GPT, which transformers does not know."""
GPT_KEY = "zerotop_gpt"
"""Key in config.json: the GPTConfig of a built-in GPT."""
PREFIX_KEY = "zerotop_prefix"
"""Key in a checkpoint's config.json: prefix of the tensors' names that an export must strip."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_KEY = "zerotop_adapter"
"""Key in a checkpoint's adapter_config.json: peft's adapter name, which is part of the weights' names."""
TRAINING_FILE = "training.json"
"""What a fine-tuned model comes from and was trained on (models/origin.py): an export makes its model card of it."""
TOKENIZER_LIMIT_BYTES = 64 << 20
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
KNOWN_FILES = frozenset({"config.json", "generation_config.json", ADAPTER_CONFIG, TRAINING_FILE, *_TOKENIZER_FILES})
"""File names allowed in model/. A checkpoint may come from anybody, and an export reads nothing else."""
_BESIDE_A_FILE = _TOKENIZER_FILES[1:5]
"""Files that are taken along when the config names a single tokenizer.json."""
_BYTES_NOTE = "bytes: tokens 0 to 255 are the bytes of UTF-8 text, 256 ends a document, the rest is padding"


def describe_model(model: nn.Module, config: Resolved, run: RunFile | None) -> dict[str, bytes]:
    """The files of model/ by name: config.json and generation_config.json of a Hugging Face model or the built-in GPT,
    and the files of the tokenizer: that of the model's Origin, else the one in zerotop.data.tokenizer.

    Not collective, and never fails: what cannot be described is left out with a warning, because a checkpoint without
    its config is better than none.
    """
    files = _configs(model, config, run)
    origin = origin_of(model)
    if origin is not None:
        return files | _own_tokenizer(origin)
    try:
        files |= _tokenizer(config.zerotop.data.tokenizer, run)
    except OSError as error:
        log.warning(f"zerotop.data.tokenizer: checkpoints are saved without it, as it can't be read: {error}")
    return files


def describe_training(model: nn.Module, config: Resolved, manifest: Manifest) -> dict[str, bytes]:
    """training.json of a model with an Origin, which changes from checkpoint to checkpoint; nothing for others."""
    origin = origin_of(model)
    if origin is None:
        return {}
    frozen = set(manifest.frozen)
    trained = sum(math.prod(shape) for name, shape in manifest.shapes.items() if name not in frozen)
    return {TRAINING_FILE: _to_bytes(origin.record(config, trained))}


def _own_tokenizer(origin: Origin) -> dict[str, bytes]:
    try:
        files = origin.tokenizer_files()
    except Exception as error:  # another library's class, which may fail in any way
        log.warning(f"checkpoints are saved without the tokenizer, as it can't be written: {error}")
        return {}
    return {name: content for name, content in files.items() if name in _TOKENIZER_FILES}


def _configs(model: nn.Module, settings: Resolved, run: RunFile | None) -> dict[str, bytes]:
    """config.json and its companions, of the module itself or of a submodule of the class that the config names (the
    path to it is then the prefix that an export strips)."""
    outer = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    for module, prefix in _candidates(outer):
        if isinstance(module, GPT):
            return {"config.json": _to_bytes(_gpt_config(module, prefix, settings.zerotop.data.tokenizer, run))}
        config = _written(module, "config")
        if config is None:
            continue
        if "model_type" in config:
            if not config.get("architectures"):
                config["architectures"] = [type(module).__name__]  # as save_pretrained() does
            owner = _owner(module, config["architectures"])
            if owner is None:
                log.warning(
                    f"{type(module).__name__}.config describes a {config['architectures'][0]}, which the model lacks: "
                    "checkpoints are saved without it, as the names of the weights would not match"
                )
                continue
            module, prefix = owner[0], prefix + owner[1]
        if prefix:
            config[PREFIX_KEY] = prefix
        generation = _written(module, "generation_config")
        files = {"config.json": _to_bytes(config)}
        if generation is not None:
            files["generation_config.json"] = _to_bytes(generation)
        return files | _adapter_config(outer)
    return {}


def _candidates(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, prefix of its parameters' names): the module itself, and the one that it wraps as `.module`."""
    yield module, ""
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module):
        yield getattr(inner, "_orig_mod", inner), "module."


def _owner(module: nn.Module, architectures: list[str]) -> tuple[nn.Module, str] | None:
    """The first module that is of a class named by the config, or a PreTrainedModel, and the prefix of its names.
    (peft's models, for one, expose the config of the model that they wrap.)"""
    for path, inner in module.named_modules():
        kinds = {kind.__name__ for kind in type(inner).__mro__}
        if kinds & {*architectures, "PreTrainedModel"}:
            return inner, plain_name(path) + "." if plain_name(path) else ""
    return None


def _adapter_config(module: nn.Module) -> dict[str, bytes]:
    """adapter_config.json, if the model has exactly one set of peft adapters."""
    for inner in module.modules():
        configs = getattr(inner, "peft_config", None)
        if isinstance(configs, dict) and configs:
            break
    else:
        return {}
    if len(configs) > 1:
        log.warning(
            f"the model has several sets of adapters ({', '.join(configs)}): checkpoints leave out their configs"
        )
        return {}
    ((name, config),) = configs.items()
    try:
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        written |= {"inference_mode": True, ADAPTER_KEY: name}  # as peft's save_pretrained() does
        return {ADAPTER_CONFIG: (json.dumps(written, indent=2, sort_keys=True, default=_value) + "\n").encode()}
    except Exception as error:  # another library's class, which may fail in any way
        log.warning(f"checkpoints are saved without peft's config, as it can't be written as JSON: {error}")
        return {}


def _value(item: Any) -> Any:
    """json.dumps default: an enum becomes its value."""
    if isinstance(item, enum.Enum):
        return item.value
    raise TypeError(f"{type(item).__name__} is not JSON serializable")


def _written(module: nn.Module, attribute: str) -> dict[str, Any] | None:
    """The Hugging Face config in `module.attribute` as a dictionary; None if there is none."""
    config = getattr(module, attribute, None)
    as_json, as_dict = getattr(config, "to_json_string", None), getattr(config, "to_dict", None)
    if isinstance(config, type) or not (callable(as_json) or callable(as_dict)):
        return None
    try:
        found = json.loads(as_json()) if callable(as_json) else json.loads(json.dumps(as_dict()))  # type: ignore[misc]
    except Exception as error:  # a script's own class, which may fail in any way
        name = f"{type(module).__name__}.{attribute}"
        log.warning(f"checkpoints are saved without {name}, as it can't be written as JSON: {error}")
        return None
    return found if isinstance(found, dict) else None


def _gpt_config(model: GPT, prefix: str, tokenizer: str, run: RunFile | None) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": GPT_TYPE, GPT_KEY: dataclasses.asdict(model.config)}
    if run is not None and run.script is None and tokenizer == "bytes":
        config["zerotop_tokenizer"] = _BYTES_NOTE
    return config | ({PREFIX_KEY: prefix} if prefix else {})


def _tokenizer(name: str, run: RunFile | None) -> dict[str, bytes]:
    if name == "bytes":
        return {}
    path = Path(run.config_folder if run is not None else "", Path(name).expanduser())
    if path.is_dir():
        paths = {name: path / name for name in _TOKENIZER_FILES}
    else:
        paths = {"tokenizer.json": path} | {name: path.parent / name for name in _BESIDE_A_FILE}
    there = {name: found for name, found in paths.items() if found.is_file()}
    if not there:
        raise FileNotFoundError(f"no tokenizer at {path}")
    total_bytes = sum(found.stat().st_size for found in there.values())
    if total_bytes > TOKENIZER_LIMIT_BYTES:
        log.warning(
            f"zerotop.data.tokenizer: checkpoints are saved without it, as its files have {total_bytes >> 20} MiB, "
            f"more than {TOKENIZER_LIMIT_BYTES >> 20}"
        )
        return {}
    return {name: found.read_bytes() for name, found in there.items()}


def _to_bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
