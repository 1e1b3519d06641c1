"""Finds a Hugging Face model on this machine, and reads its config and the names and shapes of its tensors. Torch-free.

Only headers are read, and nothing is downloaded: a model that is neither a folder nor in the cache of huggingface_hub
is an error.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config.presets import ModelError
from runtime.plan.gguf_header import read_gguf

KEY = "zerotop.model.path"
INDEX = "model.safetensors.index.json"
WAY_OUT = "--model 7B plans for a model of that size instead"
_MOST_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library accepts."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFER = re.compile(r"(^|\.)(inv_freq|masked_bias|e_score_correction_bias)$|(^|\.)attn\.bias$")
"""Names of buffers in files: rotary tables, causal masks (GPT-2's is `attn.bias`), routing statistics."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say without being read as a whole."""

    path: Path
    """A folder, or a .gguf file."""
    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, Shape]
    """Name -> shape of each parameter, as the files name them."""


def read_model(path: str, base: Path, revision: str | None = None) -> ModelFiles:
    """Read the model that zerotop.model.path names: a folder or a .gguf file (relative to `base`), or an id on the hub
    whose files are in huggingface_hub's cache. Raises ModelError, which names the way out, for anything else."""
    local = Path(base, Path(path).expanduser())
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise ModelError(f"{KEY}: {local} is a file: expected a model's folder, a .gguf file, or an id on the hub")
        config, tensors = read_gguf(local)
        return ModelFiles(local, config, tensors)
    folder = local if local.is_dir() else _cached(path, local, revision)
    config = _read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise ModelError(
            f"{KEY}: {path} holds quantized weights, which cannot be trained or sharded; give the original 16-bit model"
        )
    return ModelFiles(folder, config, _safetensors(folder))


# ---- huggingface_hub's cache -----------------------------------------------------------------------------------------
def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps files that it has downloaded."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(key):
            return Path(environment[key]).expanduser()
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _cached(name: str, local: Path, revision: str | None) -> Path:
    """The folder of the model `name` in the cache. `local`: the folder that does not exist."""
    if not _ID.fullmatch(name):
        raise ModelError(f"{KEY}: there is no folder {local}; {WAY_OUT}")
    cache = cache_folder()
    stored = cache / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (stored / "refs" / commit).read_text().strip()
        except OSError:
            commit = ""
    folder = stored / "snapshots" / commit
    if commit and folder.is_dir():
        return folder
    which = f"revision {revision} of {name}" if revision else name
    raise ModelError(
        f"{KEY}: {which} is not on this machine: there is no folder {local}, and it is not in the cache of "
        f"huggingface_hub ({cache}); download it (hf download {name}), or {WAY_OUT}"
    )


# ---- safetensors -----------------------------------------------------------------------------------------------------
def _safetensors(folder: Path) -> dict[str, Shape]:
    """Name -> shape of the tensors in the folder's safetensors files."""
    found: dict[str, Shape] = {}
    for path in _files(folder):
        found |= _header(path)
    if not found:
        raise ModelError(f"{KEY}: the safetensors files in {folder} hold no parameters; {WAY_OUT}")
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ModelError(f"{KEY}: {index} has no weight_map; {WAY_OUT}")
        names = sorted({str(name) for name in listed.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{KEY}: {folder} lacks {missing[0]}"
                f"{f' and {len(missing) - 1} more files' if len(missing) > 1 else ''} that {INDEX} lists; {WAY_OUT}"
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ModelError(
            f"{KEY}: expected {INDEX} or one .safetensors file in {folder}, found {len(files)} of them; {WAY_OUT}"
        )
    return files


def _header(path: Path) -> dict[str, Shape]:
    """Name -> shape of the parameters in one file: 8 bytes with the length of a JSON document, and the document."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"its header would have {length:,} bytes")
            document: dict[str, Any] = json.loads(file.read(length))
        return {
            name: shape
            for name, entry in document.items()
            if name != "__metadata__" and entry["dtype"] in _FLOATS and not _is_buffer(name, shape := _shape(entry))
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{KEY}: {path} is not a safetensors file: {error}") from None


def _shape(entry: Mapping[str, Any]) -> Shape:
    return tuple(int(size) for size in entry["shape"])


def _is_buffer(name: str, shape: Shape) -> bool:
    return _BUFFER.search(name) is not None and (len(shape) == 4 or not name.endswith("attn.bias"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{KEY}: {path.parent} has no {path.name}; {WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{KEY}: {path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{KEY}: {path}: expected a JSON object")
    return document
