"""Reads slices of parameters from safetensors files, so that no process ever holds a full model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.config import ConfigError

log = logging.getLogger("runtime.engine")

INDEX = "model.safetensors.index.json"

_PEFT = "base_model.model."
"""Prefix that peft's wrapper adds to the names of the wrapped model."""
REOPEN_BYTES = 32 << 20
"""Bytes to read from a mapped file before reopening it, as its pages count as this process's memory until then."""


class Weights:
    """The tensors of one file, or of the files that an index names (Hugging Face's layout)."""

    def __init__(self, path: Path, file_of: Mapping[str, Path]) -> None:
        self.path = path
        self._file_of = dict(file_of)
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a .safetensors file, an index, or a folder with either. Raises ConfigError for anything else."""
        path = Path(path).expanduser().absolute()
        if path.is_dir():
            found = sorted(path.glob("*.safetensors"))
            if (path / INDEX).is_file():
                path = path / INDEX
            elif len(found) == 1:
                path = found[0]
            else:
                raise ConfigError(
                    f"weights: expected {INDEX} or one .safetensors file in {path}, found {len(found)} of them"
                )
        try:
            if path.suffix == ".json":
                listed = json.loads(path.read_text())["weight_map"]
                return cls(path, {name: path.parent / file for name, file in listed.items()})
            weights = cls(path, {})
            weights._file_of = dict.fromkeys(weights._file(path).keys(), path)
            return weights
        except FileNotFoundError:
            raise ConfigError(f"weights: there is no file {path}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise ConfigError(f"weights: {path} is not a safetensors file or index: {error}") from None

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path]

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the files."""
        return list(self._file_of)

    def digest(self) -> str:
        """A digest of the tensors' names."""
        return hashlib.sha256("\n".join(sorted(self.names)).encode()).hexdigest()

    def _slice(self, stored: str) -> Any:
        try:
            return self._file(self._file_of[stored]).get_slice(stored)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"weights: tensor {stored} of {self._file_of[stored]} can't be read: {error}") from None

    def match_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Model name -> file name, for the parameters (with their shapes) that the files have. A prefix such as
        "model." that only one side has is ignored; the prefix that matches most names is chosen.

        Raises ConfigError, naming the first tensor that has another shape."""
        candidates = (self._stored(shapes, *prefixes) for prefixes in _prefixes(shapes))
        found = max(candidates, key=len)  # the first of the longest
        if renamed := next(((name, stored) for name, stored in found.items() if name != stored), None):
            log.info(f"weights: {self.path} has other names: {renamed[1]} for the model's {renamed[0]}")
        for name, stored in found.items():
            shape = tuple(self._slice(stored).get_shape())
            if shape != tuple(shapes[name]):
                raise ConfigError(
                    f"weights: {name} has shape {list(shape)} in {self.path} and {list(shapes[name])} in the model"
                )
        return found

    def _stored(self, shapes: Mapping[str, Any], model: str, files: str) -> dict[str, str]:
        found = {}
        for name in shapes:
            if name.startswith(model):
                candidates = (files + given.removeprefix(model) for given in (name, without_adapters(name)))
                if (stored := next((one for one in candidates if one in self._file_of), None)) is not None:
                    found[name] = stored
        return found

    def missing_error(self, missing: Sequence[str], way_out: str) -> ConfigError:
        """The ConfigError for parameters that the files lack."""
        return ConfigError(
            f"weights: {self.path} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more of the model's parameters" if len(missing) > 1 else "")
            + f"; it has {', '.join(self.names[:3])}...: {way_out}"
        )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,): elements [start, stop) of the flattened tensor `name` (a name in the files), in its stored
        dtype. Reads only the rows needed. Copy the result and drop it: it may keep the file mapped."""
        stored = self._slice(name)
        shape = tuple(stored.get_shape())
        if not shape:
            return torch.as_tensor(stored[...] if math.prod(shape) else stored[:]).reshape(-1)[start:stop]
        row = max(1, math.prod(shape[1:]))
        first, last = start // row, -(-stop // row)
        rows: torch.Tensor = stored[first:last]
        self._read_bytes += rows.numel() * rows.element_size()
        if self._read_bytes > REOPEN_BYTES:
            self._open.clear()
            self._read_bytes = 0
        return rows.reshape(-1)[start - first * row : stop - first * row]


def _prefixes(shapes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Candidate prefixes of names: (in the model, in the files)."""
    heads = dict.fromkeys(name.split(".", 1)[0] + "." for name in shapes if "." in name)
    known = ("model.", "transformer.", "module.", "base_model.")
    pairs = [("", ""), *((head, "") for head in heads), *(("", head) for head in known)]
    if any(name.startswith(_PEFT) for name in shapes):
        inner = dict.fromkeys(n.removeprefix(_PEFT).split(".", 1)[0] + "." for n in shapes if n.startswith(_PEFT))
        pairs += [(_PEFT, ""), *((_PEFT + head, "") for head in inner), *((_PEFT, head) for head in known)]
    return pairs


def without_adapters(name: str) -> str:
    """The name that a parameter had before peft put adapters around its module."""
    parts = iter(name.split("."))
    kept = []
    for part in parts:
        if part == "modules_to_save":
            next(parts, None)  # the adapter's name
        elif part not in ("base_layer", "original_module"):
            kept.append(part)
    return ".".join(kept)
