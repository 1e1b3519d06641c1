"""Parameters in safetensors files, read range by range: nobody ever holds a whole model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.config import ConfigError

log = logging.getLogger("runtime.engine")

INDEX = "model.safetensors.index.json"

REOPEN_BYTES = 32 << 20
"""Read from a mapped file before it is opened anew: pages that were read count as this process's memory until then."""


class Weights:
    """The tensors of one file, or of the files that an index names (Hugging Face's layout)."""

    def __init__(self, path: Path, file_of: Mapping[str, Path]) -> None:
        self.path = path
        self._file_of = dict(file_of)
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0
        self._prefix: tuple[str, str] = ("", "")  # of the model's names, of the files' names

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """`path`: a .safetensors file, an index, or a folder with either. Raises ConfigError when it is none of
        them."""
        path = Path(path).expanduser()
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
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"weights: {path} is no safetensors file or index: {error}") from None

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path]

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def _slice(self, name: str) -> Any:
        model, files = self._prefix
        if model and not name.startswith(model):
            raise KeyError(name)
        stored = files + name.removeprefix(model)
        try:
            return self._file(self._file_of[stored]).get_slice(stored)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"weights: tensor {stored} of {self._file_of[stored]} can't be read: {error}") from None

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError, naming the first tensor that is missing or has another shape. A prefix that all names
        have on one side only ("model.") is found and taken off."""
        self._prefix = next(
            (pair for pair in _prefixes(shapes) if all(self._has(name, pair) for name in shapes)), ("", "")
        )
        if any(self._prefix):
            log.info(f"weights: names in {self.path} read with {self._prefix[1]!r} for the model's {self._prefix[0]!r}")
        missing = [name for name in shapes if not self._has(name, self._prefix)]
        if missing:
            raise ConfigError(
                f"weights: {self.path} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more of the model's parameters" if len(missing) > 1 else "")
                + f"; it has {', '.join(self.names[:3])}...: give the weights of this model"
            )
        for name, shape in shapes.items():
            stored = tuple(self._slice(name).get_shape())
            if stored != tuple(shape):
                raise ConfigError(
                    f"weights: {name} has shape {list(stored)} in {self.path} and {list(shape)} in the model"
                )

    def _has(self, name: str, prefix: tuple[str, str]) -> bool:
        return name.startswith(prefix[0]) and prefix[1] + name.removeprefix(prefix[0]) in self._file_of

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) elements [start, stop) of the flattened tensor, as stored; only their rows are read. Copy
        it and let it go: it may hold the file's mapping."""
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
    """What may be at the front of names: on the model's side, on the files' side."""
    common = {name.split(".", 1)[0] + "." for name in shapes if "." in name}
    heads = [head for head in common if all(name.startswith(head) for name in shapes)]
    known = ("model.", "transformer.", "module.", "base_model.")
    return [("", ""), *((head, "") for head in heads), *(("", head) for head in known)]
