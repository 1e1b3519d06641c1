"""A checkpoint as a folder that Hugging Face's libraries read: safetensors in shards, an index, and what is known of
the model and its tokenizer.

Tensors are read, converted and written shard by shard, so that memory holds one shard and a rank's slice of one tensor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.checkpoint.describe import ADAPTER_CONFIG, KNOWN_FILES, PREFIX_KEY
from runtime.checkpoint.format.manifest import MODEL_FILES, CheckpointError
from runtime.checkpoint.format.reader import CheckpointReader, CheckpointTensor
from runtime.export.adapters import ADAPTER_FILE, find_adapters, has_adapters
from runtime.models.weights import INDEX
from runtime.state.precision import DTYPES
from runtime.wire.sizes import format_size

_WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Tensor:
    name: str
    stored: CheckpointTensor
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return self.stored.numel * self.dtype.itemsize


class HuggingFaceExport:
    """What an export of the checkpoint at `path` will write; `write` writes it.

    dtype: "fp32", "bf16" or "fp16" for every floating tensor; "auto": parameters as the run computed with them, buffers
    as they are. A shard has at most `shard_bytes` of tensors, or one tensor that is larger. Raises CheckpointError for
    a checkpoint that can't be exported.
    """

    def __init__(self, path: Path, dtype: str, shard_bytes: int) -> None:
        self.reader = CheckpointReader(path)
        self.dtype = self.reader.manifest.precision if dtype == "auto" else dtype
        self.extra = self._known_files()
        self._prefix = ""
        self.adapters = has_adapters(stored.name for stored in self.reader.tensors)
        names = self._adapters() if self.adapters else self._model()
        tensors = self._tensors(dtype, names)
        self.shards = [tensors] if self.adapters else _cut(tensors, shard_bytes)  # peft reads one file

    def _known_files(self) -> dict[str, bytes]:
        """Of model/: what this version writes there and the manifest vouches for."""
        path, manifest = self.reader.path, self.reader.manifest
        names = [
            name for name in sorted(KNOWN_FILES) if not manifest.files or f"{MODEL_FILES}/{name}" in manifest.files
        ]
        files = [path / MODEL_FILES / name for name in names]
        try:
            return {file.name: file.read_bytes() for file in files if file.is_file() and not file.is_symlink()}
        except OSError as error:
            raise CheckpointError(f"{path / MODEL_FILES} can't be read: {error}") from None

    def _model(self) -> dict[str, str] | None:
        """Makes config.json fit what is written. All tensors are, without the config's prefix."""
        path, manifest = self.reader.path, self.reader.manifest
        if manifest.excluded:
            raise CheckpointError(
                f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True), "
                f"{manifest.excluded[0]} for one: export one that holds all of them"
            )
        try:
            config = json.loads(self.extra.get("config.json", b"{}"))
            self._prefix = config.pop(PREFIX_KEY, "")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path / MODEL_FILES} can't be read: {error}") from None
        if "model_type" in config:
            # What the run began with may have been another precision. Newer transformers say "dtype", and read both.
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(DTYPES[self.dtype]).removeprefix("torch.")
        self.extra.pop(ADAPTER_CONFIG, None)
        if config:
            self.extra["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return None

    def _adapters(self) -> dict[str, str]:
        """Leaves adapter_config.json and the tokenizer to be written; the names of the tensors that are."""
        found = find_adapters(
            self.reader.path, self.extra.get(ADAPTER_CONFIG), self.reader.tensors, self.reader.manifest.frozen
        )
        for name in ("config.json", "generation_config.json"):  # the base model's, which peft reads where that is
            self.extra.pop(name, None)
        self.extra[ADAPTER_CONFIG] = found.config
        return found.names

    def _tensors(self, dtype: str, names: dict[str, str] | None) -> list[_Tensor]:
        """names: of those that are written; None: all, by their own."""
        tensors: dict[str, _Tensor] = {}
        for stored in self.reader.tensors:
            if names is not None and stored.name not in names:
                continue
            name = stored.name.removeprefix(self._prefix) if names is None else names[stored.name]
            if name in tensors:
                raise CheckpointError(
                    f"checkpoint {self.reader.path}: {stored.name} and {tensors[name].stored.name} would both be "
                    f"called {name}"
                )
            converts = dtype != "auto" and stored.dtype.is_floating_point
            tensors[name] = _Tensor(name, stored, DTYPES[dtype] if converts else stored.dtype)
        return list(tensors.values())

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.size_bytes for shard in self.shards for tensor in shard)

    @property
    def needed_bytes(self) -> int:
        """Disk space, with room for headers and the index."""
        count = sum(len(shard) for shard in self.shards)
        return self.tensor_bytes + sum(map(len, self.extra.values())) + 512 * count + (1 << 20)

    def write(self, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        """Fill `folder`; a line per shard goes to `tell`. Returns what was written. Raises OSError when it can't be
        written, CheckpointError when a tensor can't be read or does not fit the dtype."""
        began = time.monotonic()
        files = [ADAPTER_FILE if self.adapters else "model.safetensors"]
        if len(self.shards) > 1:
            total = len(self.shards)
            files = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        for number, (file, shard) in enumerate(zip(files, self.shards, strict=True), 1):
            shard_began = time.monotonic()
            self._write_shard(folder / file, shard)
            size = format_size(sum(tensor.size_bytes for tensor in shard))
            tell(f"{number}/{len(files)} {file}: {size} in {time.monotonic() - shard_began:.1f} s")
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.tensor_bytes},
                "weight_map": {t.name: f for f, shard in zip(files, self.shards, strict=True) for t in shard},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            files.append(INDEX)
        for name, content in self.extra.items():
            (folder / name).write_bytes(content)
        tensors = [tensor for shard in self.shards for tensor in shard]
        return {
            "checkpoint": str(self.reader.path),
            "step": self.reader.manifest.step,
            "dtype": self.dtype,
            "adapters": self.adapters,
            "tensors": len(tensors),
            "parameters": sum(tensor.stored.numel for tensor in tensors if tensor.stored.is_parameter),
            "tensor_bytes": self.tensor_bytes,
            "files": [*files, *self.extra],
            "seconds": round(time.monotonic() - began, 3),
        }

    def _write_shard(self, path: Path, shard: list[_Tensor]) -> None:
        content = {tensor.name: self._read(tensor) for tensor in shard}
        try:
            save_file(content, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.name} can't be written: {error}") from None
        path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask has it; safetensors makes it our own alone

    def _read(self, tensor: _Tensor) -> torch.Tensor:
        whole = self.reader.read(tensor.stored, tensor.dtype)
        # Masks in buffers may well be infinite; parameters never are, so these were too large.
        if tensor.dtype == torch.float16 != tensor.stored.dtype and tensor.stored.is_parameter and whole.isinf().any():
            raise CheckpointError(
                f"{tensor.name} has values beyond 65,504, the largest of fp16: export with --dtype "
                f"{_WORDS.get(tensor.stored.dtype, 'fp32')}"
            )
        return whole


def _cut(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """In order, each shard as full as it may be; one empty shard where there is nothing."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards
