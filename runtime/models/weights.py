"""Reads slices of parameters from safetensors files, so that no process ever holds a full model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from runtime.config import ConfigError
from runtime.host.heap import mapped
from runtime.models.conversion import Conversion, conversion_of
from runtime.models.names import without_adapters

log = logging.getLogger("runtime.engine")

INDEX = "model.safetensors.index.json"

ROWS_MARK = "_zerotop_stored_rows"
"""Attribute of an embedding or a head that has more rows than its weight in the files: the number of rows there."""

_PEFT = "base_model.model."
"""Prefix that peft's wrapper adds to the names of the wrapped model."""
_TRAINABLE = ("F32", "BF16", "F16", "F64")
"""Dtypes of stored weights that can be trained, as safetensors calls them."""
REOPEN_BYTES = 32 << 20
"""Bytes to read from a mapped file before reopening it, as its pages count as this process's memory until then."""


class Weights:
    """The tensors of one file, or of the files that an index names (Hugging Face's layout)."""

    def __init__(self, path: Path, file_of: Mapping[str, Path]) -> None:
        self.path = path
        self._file_of = dict(file_of)
        self._conversion: Conversion | None = None
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0

    @classmethod
    def open(cls, path: str | Path) -> Weights:
        """Open a .safetensors file, an index, or a folder with either. Raises ConfigError for anything else."""
        path = Path(path).expanduser().absolute()
        if path.is_dir():
            path = _in_folder(path)
        if path.suffix == ".gguf":
            raise ConfigError(
                f"weights: {path} is a GGUF file: convert it to a folder with safetensors first, with "
                "runtime.models.gguf.convert(path)"
            )
        try:
            if path.suffix == ".json":
                listed = json.loads(path.read_text())["weight_map"]
                file_of = {name: path.parent / file for name, file in listed.items()}
                _check_files(path, sorted(set(file_of.values())))
                return cls(path, file_of)
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

    def convert_for(self, model: nn.Module, names: Iterable[str]) -> None:
        """From now on, tensors are also found under the names and in the shapes that transformers gives them in
        `model`. `names`: those of its parameters that these files are for."""
        self._conversion = conversion_of(model, names, self, self.names)

    def _slice(self, stored: str) -> Any:
        try:
            return self._file(self._file_of[stored]).get_slice(stored)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"weights: tensor {stored} of {self._file_of[stored]} can't be read: {error}") from None

    def stored_shape(self, stored: str) -> tuple[int, ...]:
        """Shape of a tensor in the files."""
        return tuple(self._slice(stored).get_shape())

    def stored_dtype(self, stored: str) -> str:
        """Dtype of a tensor in the files, as safetensors calls it."""
        return str(self._slice(stored).get_dtype())

    def match_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Model name -> file name, for the parameters (with their shapes) that the files have. A prefix such as
        "model." that only one side has is ignored; the prefix that matches most names is chosen.

        Raises ConfigError, naming the first tensor that has another shape."""
        outer = [(self._conversion.prefix, "")] if self._conversion and self._conversion.prefix else []
        candidates = (self._stored(shapes, *prefixes) for prefixes in (*outer, *_prefixes(shapes)))
        found = max(candidates, key=len)  # the first of the longest
        if renamed := next(((name, stored) for name, stored in found.items() if name != stored), None):
            log.info(f"weights: {self.path} has other names: {renamed[1]} for the model's {renamed[0]}")
        for name, stored in found.items():
            shape = self._shape(stored)
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
                if (stored := next(filter(None, map(self._find, candidates)), None)) is not None:
                    found[name] = stored
        return found

    def _find(self, name: str) -> str | None:
        """The name under which read() gives the tensor that the model, or the files, call `name`."""
        if self._conversion is not None:
            if name in self._conversion.converted:
                return name
            name = self._conversion.renamed.get(name, name)
        return name if name in self._file_of else None

    def _shape(self, found: str) -> tuple[int, ...]:
        if self._conversion is not None and found in self._conversion.converted:
            return self._conversion.converted[found].shape
        return self.stored_shape(found)

    def refuse_quantized(self, found: str) -> None:
        """Raise ConfigError if the floating-point tensor that match_names() found under this name is quantized."""
        converted = self._conversion.converted.get(found) if self._conversion is not None else None
        for stored in converted.group.stored if converted is not None else [found]:
            if (dtype := self.stored_dtype(stored)) not in _TRAINABLE:
                raise ConfigError(
                    f"weights: {stored} of {self.path} has dtype {dtype}: expected one of {', '.join(_TRAINABLE)}. "
                    "Quantized weights can't be trained; dequantize the model (many have a bf16 version) and save it"
                )

    def missing_error(self, missing: Sequence[str], way_out: str) -> ConfigError:
        """The ConfigError for parameters that the files lack."""
        return ConfigError(
            f"weights: {self.path} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more of the model's parameters" if len(missing) > 1 else "")
            + f"; it has {', '.join(self.names[:3])}...: {way_out}"
        )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,): elements [start, stop) of the flattened tensor `name` (as match_names() found it), in its
        stored dtype. Reads only the rows needed. Copy the result and drop it: it may keep the file mapped."""
        with mapped():  # what is read is copied and dropped, and must not leave holes in malloc's heap
            if self._conversion is not None and name in self._conversion.converted:
                return self._conversion.read(self, name, start, stop)
            return self.read_stored(name, start, stop)

    def read_stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As read(), of a tensor in the files."""
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


def _in_folder(path: Path) -> Path:
    """The index of a folder, or its only safetensors file. Raises ConfigError if it has neither."""
    found = sorted(path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        return path / INDEX
    if len(found) == 1:
        return found[0]
    if not found and (pickled := sorted(path.glob("*.bin"))):
        raise ConfigError(
            f"weights: {path} has no safetensors, only {pickled[0].name}, which can't be read in parts. Convert it "
            "once with transformers: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    raise ConfigError(f"weights: expected {INDEX} or one .safetensors file in {path}, found {len(found)} of them")


def _check_files(index: Path, files: Sequence[Path]) -> None:
    """Raise ConfigError if some of the files that an index names are not there."""
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(
            f"weights: {index} names {missing[0].name}, which is not in {index.parent}"
            + (f", and {len(missing) - 1} more of its {len(files)} files are not, either" if missing[1:] else "")
            + ". Download the model again, or copy the missing files"
        )


def _prefixes(shapes: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Candidate prefixes of names: (in the model, in the files)."""
    heads = dict.fromkeys(name.split(".", 1)[0] + "." for name in shapes if "." in name)
    known = ("model.", "transformer.", "module.", "base_model.")
    pairs = [("", ""), *((head, "") for head in heads), *(("", head) for head in known)]
    for peft in dict.fromkeys(name[: name.index(_PEFT) + len(_PEFT)] for name in shapes if _PEFT in name):
        inner = dict.fromkeys(n.removeprefix(peft).split(".", 1)[0] + "." for n in shapes if n.startswith(peft))
        pairs += [(peft, ""), *((peft + head, "") for head in inner), *((peft, head) for head in known)]
    return pairs
