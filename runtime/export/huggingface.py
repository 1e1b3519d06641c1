"""Writes a checkpoint as a folder for Hugging Face's libraries: safetensors files, an index, config, tokenizer and
model card.

Tensors are read, converted and written file by file, so that memory holds one file and a rank's slice of one tensor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from runtime.checkpoint.content.describe import ADAPTER_CONFIG, KNOWN_FILES, PREFIX_KEY, TRAINING_FILE
from runtime.checkpoint.format.manifest import MODEL_FILES, CheckpointError
from runtime.checkpoint.format.reader import CheckpointReader
from runtime.export.adapters import ADAPTER_FILE, find_adapters
from runtime.export.card import CARD, model_card
from runtime.export.conversion import as_in_files
from runtime.export.merge import Merge
from runtime.export.tensors import ExportTensor, from_checkpoint
from runtime.models.names import has_adapters
from runtime.models.weights import INDEX
from runtime.state.precision import DTYPES
from runtime.wire.sizes import format_size


class HuggingFaceExport:
    """Plans the export of the checkpoint at `path`; `write` writes it.

    dtype: "fp32", "bf16" or "fp16" for all floating-point tensors; "auto": parameters in the run's compute dtype,
    buffers in their own. A file has at most `shard_bytes` of tensors, or one larger tensor. merge: add the adapters to
    the base model's weights, which are in the folder `base`, or where the checkpoint says. Raises CheckpointError for a
    checkpoint that can't be exported.
    """

    def __init__(self, path: Path, dtype: str, shard_bytes: int, merge: bool = False, base: Path | None = None) -> None:
        self.reader = CheckpointReader(path)
        self.dtype = self.reader.manifest.precision if dtype == "auto" else dtype
        self.extra = self._known_files()
        record = self.extra.pop(TRAINING_FILE, None)
        has = has_adapters(stored.name for stored in self.reader.tensors)
        if merge and not has:
            raise CheckpointError(f"--merge: checkpoint {path} has no adapters; export it without --merge")
        self.adapters = has and not merge
        if self.adapters:
            tensors = self._named(dtype, self._adapters(record))
        elif merge:
            config = self.extra.get(ADAPTER_CONFIG)
            self._model()
            tensors = Merge(self.reader, config, base or _base_folder(record), dtype).tensors
        else:
            prefix = self._model()
            self._check_whole()
            names = [(stored.name, stored.name.removeprefix(prefix)) for stored in self.reader.tensors]
            tensors = self._named(dtype, names)
        if not self.adapters:
            tensors = as_in_files(tensors, self.extra.get("config.json"))
        card = model_card(record, self.reader.manifest.step, self._kind(merge)) if record is not None else None
        if card is not None:
            self.extra[CARD] = card
        self.shards = [tensors] if self.adapters else _cut(tensors, shard_bytes)  # peft reads one file

    def _kind(self, merge: bool) -> str:
        return "merged" if merge else "adapters" if self.adapters else "full"

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

    def _check_whole(self) -> None:
        path, manifest = self.reader.path, self.reader.manifest
        if manifest.excluded:
            raise CheckpointError(
                f"checkpoint {path} was saved without its frozen parameters (exclude_frozen_parameters=True), "
                f"such as {manifest.excluded[0]}: export a checkpoint that holds all parameters"
            )

    def _model(self) -> str:
        """Adapt config.json to the export. Returns the prefix that the names of its tensors have in the checkpoint."""
        try:
            config = json.loads(self.extra.get("config.json", b"{}"))
            prefix = str(config.pop(PREFIX_KEY, ""))
            config.pop("_name_or_path", None)  # where the base model was on the machine that trained
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.reader.path / MODEL_FILES} can't be read: {error}") from None
        if "model_type" in config:
            # The config's dtype may differ from the exported one. Newer transformers say "dtype", and read both.
            key = "dtype" if "dtype" in config else "torch_dtype"
            config[key] = str(DTYPES[self.dtype]).removeprefix("torch.")
        self.extra.pop(ADAPTER_CONFIG, None)
        if config:
            self.extra["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return prefix

    def _adapters(self, record: bytes | None) -> list[tuple[str, str]]:
        """Keep adapter_config.json and the tokenizer as extra files. Returns (name in the checkpoint, exported name) of
        the tensors to export."""
        found = find_adapters(
            self.reader.path,
            self.extra.get(ADAPTER_CONFIG),
            self.reader.tensors,
            self.reader.manifest.frozen,
            self.reader.manifest.tied,
            base_name(record),
        )
        for name in ("config.json", "generation_config.json"):  # the base model has its own
            self.extra.pop(name, None)
        self.extra[ADAPTER_CONFIG] = found.config
        return found.names

    def _named(self, dtype: str, names: list[tuple[str, str]]) -> list[ExportTensor]:
        """Tensors of the checkpoint to write. names: (name in the checkpoint, exported name)."""
        stored = {tensor.name: tensor for tensor in self.reader.tensors}
        tensors: dict[str, ExportTensor] = {}
        for known, name in names:
            if name in tensors:
                raise CheckpointError(
                    f"checkpoint {self.reader.path}: {known} and {tensors[name].origin} would both be called {name}"
                )
            tensors[name] = from_checkpoint(self.reader, stored[known], name, dtype)
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
            "parameters": sum(tensor.numel for tensor in tensors if tensor.is_parameter),
            "tensor_bytes": self.tensor_bytes,
            "files": [*files, *self.extra],
            "seconds": round(time.monotonic() - began, 3),
        }

    def _write_shard(self, path: Path, shard: list[ExportTensor]) -> None:
        content = {tensor.name: tensor.checked() for tensor in shard}
        try:
            save_file(content, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.name} can't be written: {error}") from None
        path.chmod(path.parent.stat().st_mode & 0o666)  # as the umask says; safetensors creates files with mode 0600


def _base(record: bytes | None) -> dict[str, Any]:
    """What training.json says of the base model; empty if it says nothing."""
    try:
        base = json.loads(record or b"{}").get("base", {})
        return base if isinstance(base, dict) else {}
    except (ValueError, AttributeError, RecursionError):
        return {}


def base_name(record: bytes | None) -> str | None:
    """The base model as adapter_config.json names it: an id on the hub, or the last part of a path; None if the
    checkpoint does not know it."""
    name = _base(record).get("name")
    return name if isinstance(name, str) else None


def _base_folder(record: bytes | None) -> Path | None:
    """The folder with the base model's files, if it is still there."""
    folder = _base(record).get("folder")
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None


def _cut(tensors: list[ExportTensor], shard_bytes: int) -> list[list[ExportTensor]]:
    """Split tensors, in order, into files as large as allowed; at least one file."""
    shards: list[list[ExportTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards
