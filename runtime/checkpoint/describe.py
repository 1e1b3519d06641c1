"""What a checkpoint says of its model beside the tensors, as files: its config and its tokenizer. Never imports
transformers: a Hugging Face model is known by how its config can be written."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from runtime.models.gpt import GPT

if TYPE_CHECKING:
    from runtime.engine import Engine

log = logging.getLogger("runtime.checkpoint")

GPT_TYPE = "zerotop-gpt"
"""`model_type` of the built-in GPT, which transformers does not know."""
GPT_KEY = "zerotop_gpt"
"""Its GPTConfig, in config.json."""
PREFIX_KEY = "zerotop_prefix"
"""In a checkpoint's config.json: what the names of the tensors begin with and those of the config's model don't."""
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
_BESIDE_A_FILE = _TOKENIZER_FILES[1:5]
"""What belongs to a tokenizer.json that is named alone."""
_BYTES_NOTE = "bytes: tokens 0 to 255 are the bytes of UTF-8 text, 256 ends a document, the rest is padding"


def describe_model(engine: Engine) -> dict[str, bytes]:
    """Small files by name: config.json and generation_config.json where the module has Hugging Face's, or is the
    built-in GPT, and the files of the tokenizer in zerotop.data.tokenizer.

    Changes nothing, takes no part in any collective, and never fails: what can't be described is left out with a
    warning, for a checkpoint without its config is worth more than none.
    """
    files = _configs(engine)
    try:
        files |= _tokenizer(engine)
    except OSError as error:
        log.warning(f"zerotop.data.tokenizer: checkpoints go without it, for it can't be read: {error}")
    return files


def _configs(engine: Engine) -> dict[str, bytes]:
    for module, prefix in _candidates(engine.module):
        if isinstance(module, GPT):
            return {"config.json": _to_bytes(_gpt_config(engine, module, prefix))}
        config = _written(module, "config")
        if config is None:
            continue
        if "model_type" in config and not config.get("architectures"):
            config["architectures"] = [type(module).__name__]  # as save_pretrained() does
        if prefix:
            config[PREFIX_KEY] = prefix
        generation = _written(module, "generation_config")
        return {"config.json": _to_bytes(config)} | (
            {} if generation is None else {"generation_config.json": _to_bytes(generation)}
        )
    return {}


def _candidates(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The module, and the one that it wraps as `.module`; with what that adds to the names of parameters."""
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    yield module, ""
    inner = getattr(module, "module", None)
    if isinstance(inner, nn.Module):
        yield getattr(inner, "_orig_mod", inner), "module."


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


def _gpt_config(engine: Engine, model: GPT, prefix: str) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": GPT_TYPE, GPT_KEY: dataclasses.asdict(model.config)}
    run = engine.session.run
    if run is not None and run.script is None and engine.config.zerotop.data.tokenizer == "bytes":
        config["zerotop_tokenizer"] = _BYTES_NOTE
    return config | ({PREFIX_KEY: prefix} if prefix else {})


def _tokenizer(engine: Engine) -> dict[str, bytes]:
    name, run = engine.config.zerotop.data.tokenizer, engine.session.run
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
