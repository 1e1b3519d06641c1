"""Writes a checkpoint as a folder for Hugging Face's libraries: safetensors files, an index, config and tokenizer.

Tensors are read, converted and written file by file, so that memory holds one file and a rank's slice of one tensor.
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
    """Plans the export of the checkpoint at `path`; `write` writes it.

    dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; "auto": parameters in the run's compute dtype,
    buffers in their own. A file has at most `shard_bytes` of tensors, or one larger tensor. Raises CheckpointError for
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
        """The files of model/ that this version knows and the manifest lists."""
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
        """Adapt config.json to the exported dtype and prefix. Returns None: all tensors are exported."""
        path, manifest = self.reader.path, self.reader.manifest
        if manifest.excluded:
            raise CheckpointError(
                f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True), "
                f"such as {manifest.excluded[0]}: export a checkpoint that holds all parameters"
            )
        try:
            config = json.loads(self.extra.get("config.json", b"{}"))
            self._prefix = config.pop(PREFIX_KEY, "")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path / MODEL_FILES} can't be read: {error}") from None
        if "model_type" in config:
            # The config's dtype may differ from the exported one. Newer transformers say "dtype", and read both.
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(DTYPES[self.dtype]).removeprefix("torch.")
        self.extra.pop(ADAPTER_CONFIG, None)
        if config:
            self.extra["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return None

    def _adapters(self) -> dict[str, str]:
        """Keep adapter_config.json and the tokenizer as extra files. Returns the names of the tensors to export."""
        found = find_adapters(
            self.reader.path, self.extra.get(ADAPTER_CONFIG), self.reader.tensors, self.reader.manifest.frozen
        )
        for name in ("config.json", "generation_config.json"):  # the base model has its own
            self.extra.pop(name, None)
        self.extra[ADAPTER_CONFIG] = found.config
        return found.names

    def _tensors(self, dtype: str, names: dict[str, str] | None) -> list[_Tensor]:
        """The tensors to write. names: checkpoint name -> exported name; None: all tensors, without the prefix."""
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
        """Size of all exported tensors in bytes."""
        return sum(tensor.size_bytes for shard in self.shards for tensor in shard)

    @property
    def needed_bytes(self) -> int:
        """Required disk space, including headers and index."""
        count = sum(len(shard) for shard in self.shards)
        return self.tensor_bytes + sum(map(len, self.extra.values())) + 512 * count + (1 << 20)

    def write(self, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        """Write all files to `folder`, with a line per file to `tell`. Returns a summary. Raises OSError if writing
        fails, CheckpointError if a tensor cannot be read or does not fit the dtype."""
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
        path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask says; safetensors creates files with mode 0600

    def _read(self, tensor: _Tensor) -> torch.Tensor:
        whole = self.reader.read(tensor.stored, tensor.dtype)
        # Buffers may hold infinite masks; infinite parameters mean overflow.
        if tensor.dtype == torch.float16 != tensor.stored.dtype and tensor.stored.is_parameter and whole.isinf().any():
            raise CheckpointError(
                f"{tensor.name} has values beyond 65,504, fp16's largest: export with --dtype "
                f"{_WORDS.get(tensor.stored.dtype, 'fp32')}"
            )
        return whole


def _cut(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """Split tensors, in order, into files as large as allowed; at least one file."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards
