"""What a checkpoint says of its model beside the tensors, as files: its config and its tokenizer. Never imports
transformers: a Hugging Face model is known by how its config can be written."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from runtime.config import Resolved
from runtime.models.gpt import GPT
from runtime.models.names import plain_name
from runtime.wire.rundir import RunFile

log = logging.getLogger("runtime.checkpoint")

GPT_TYPE = "zerotop-gpt"
"""`model_type` of the built-in GPT, which transformers does not know."""
GPT_KEY = "zerotop_gpt"
"""Its GPTConfig, in config.json."""
PREFIX_KEY = "zerotop_prefix"
"""In a checkpoint's config.json: what the names of the tensors begin with and those of the config's model don't."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_KEY = "zerotop_adapter"
"""In a checkpoint's adapter_config.json: peft's name of the adapters, which is part of the names of their weights."""
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
KNOWN_FILES = frozenset({"config.json", "generation_config.json", ADAPTER_CONFIG, *_TOKENIZER_FILES})
"""What model/ may hold. A checkpoint may come from anybody, and an export hands on nothing else."""
_BESIDE_A_FILE = _TOKENIZER_FILES[1:5]
"""What belongs to a tokenizer.json that is named alone."""
_BYTES_NOTE = "bytes: tokens 0 to 255 are the bytes of UTF-8 text, 256 ends a document, the rest is padding"


def describe_model(model: nn.Module, config: Resolved, run: RunFile | None) -> dict[str, bytes]:
    """Small files by name: config.json and generation_config.json where the module has Hugging Face's, or is the
    built-in GPT, and the files of the tokenizer in zerotop.data.tokenizer.

    Changes nothing, takes no part in any collective, and never fails: what can't be described is left out with a
    warning, for a checkpoint without its config is worth more than none.
    """
    files = _configs(model, config, run)
    try:
        files |= _tokenizer(config.zerotop.data.tokenizer, run)
    except OSError as error:
        log.warning(f"zerotop.data.tokenizer: checkpoints go without it, for it can't be read: {error}")
    return files


def _configs(model: nn.Module, settings: Resolved, run: RunFile | None) -> dict[str, bytes]:
    """Of the module, or of a module inside that is what its config says: then names lose the way to it at export."""
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
                    f"{type(module).__name__}.config is of a {config['architectures'][0]}, which is not in the model: "
                    "checkpoints lack it, for the names of the weights would not fit it"
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
    """The module, and the one that it wraps as `.module`; with what that adds to the names of parameters."""
    yield module, ""
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module):
        yield getattr(inner, "_orig_mod", inner), "module."


def _owner(module: nn.Module, architectures: list[str]) -> tuple[nn.Module, str] | None:
    """The module, or the first one inside, that is of a class that the config names, or one of transformers' own (whose
    names fit each other); with the way to it. peft's models, for one, show the config of the model that they wrap."""
    for path, inner in module.named_modules():
        kinds = {kind.__name__ for kind in type(inner).__mro__}
        if kinds & {*architectures, "PreTrainedModel"}:
            return inner, plain_name(path) + "." if plain_name(path) else ""
    return None


def _adapter_config(module: nn.Module) -> dict[str, bytes]:
    """peft's config of the adapters in the model, if it has one set of them."""
    for inner in module.modules():
        configs = getattr(inner, "peft_config", None)
        if isinstance(configs, dict) and configs:
            break
    else:
        return {}
    if len(configs) > 1:
        log.warning(
            f"the model has several sets of adapters ({', '.join(configs)}): checkpoints go without their configs"
        )
        return {}
    ((name, config),) = configs.items()
    try:
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        written |= {"inference_mode": True, ADAPTER_KEY: name}  # as peft's save_pretrained() does
        return {ADAPTER_CONFIG: (json.dumps(written, indent=2, sort_keys=True, default=_value) + "\n").encode()}
    except Exception as error:  # another library's class, which may fail in any way
        log.warning(f"peft's config can't be written as JSON, so checkpoints lack it: {error}")
        return {}


def _value(item: Any) -> Any:
    """Enums are written as what they stand for."""
    if isinstance(item, enum.Enum):
        return item.value
    raise TypeError(f"{type(item).__name__} is no plain value")


def _written(module: nn.Module, attribute: str) -> dict[str, Any] | None:
    """The attribute's config in Hugging Face's way; None where there is none."""
    config = getattr(module, attribute, None)
    as_json, as_dict = getattr(config, "to_json_string", None), getattr(config, "to_dict", None)
    if isinstance(config, type) or not (callable(as_json) or callable(as_dict)):
        return None
    try:
        found = json.loads(as_json()) if callable(as_json) else json.loads(json.dumps(as_dict()))  # type: ignore[misc]
    except Exception as error:  # a script's own class, which may fail in any way
        log.warning(f"{type(module).__name__}.{attribute} can't be written as JSON, so checkpoints lack it: {error}")
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
        raise FileNotFoundError(f"{path}: there is no tokenizer")
    total_bytes = sum(found.stat().st_size for found in there.values())
    if total_bytes > TOKENIZER_LIMIT_BYTES:
        log.warning(
            f"zerotop.data.tokenizer: checkpoints go without it, for its files have {total_bytes >> 20} MiB; expected "
            f"at most {TOKENIZER_LIMIT_BYTES >> 20}"
        )
        return {}
    return {name: found.read_bytes() for name, found in there.items()}


def _to_bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
